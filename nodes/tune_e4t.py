"""Tune E4T."""

import logging
from functools import partial

from comfy_api.latest import io

from ..e4t.domain import Domain as DomainValue
from ..e4t.tune import TunedEdit, tuning_recipe
from ..e4t.tune_whole import TunedWhole, whole_recipe
from ..e4t.vision import vision_for
from ..host.bases import base_name, warn_of_other_prediction
from ..host.text import fingerprint_of, widths
from ..perfusion.covariance import precision
from ..textual_inversion.train import learn_word
from .sockets import Domain
from .training_inputs import chosen_seed, how_to_run, outputs, run, stops, what_to_learn

CONCEPT, TUNED = "concept", "tuned model"
log = logging.getLogger("concepts")


class ConceptsTuneE4T(io.ComfyNode):
    """Makes a concept of one picture in a few steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsTuneE4T",
            display_name="Tune E4T",
            category="concepts/train",
            description=(
                "Makes a Perfusion concept of a single picture in a few steps: the domain's encoder says what the "
                "thing is, and tuning finishes it. Only for things of the domain's class. The concept needs no encoder "
                "when it is used, and composes like any other."
            ),
            search_aliases=["e4t", "encoder for tuning", "one picture", "one shot", "instant concept"],
            is_input_list=True,
            inputs=[
                Domain.Input("domain", tooltip="What was pretrained, from Load E4T Domain."),
                *(each for each in what_to_learn("One photo of the thing, or a few of the same thing")
                  if each.id not in ("init_text", "captions")),
                io.Int.Input("steps", default=5, min=1, max=1000, tooltip=(
                    "How long to tune. Five to fifteen do for most pictures; more come nearer to the picture and copy "
                    "it more."
                )),
                chosen_seed(),
                *how_to_run(),
                io.Combo.Input("result", options=[CONCEPT, TUNED], default=CONCEPT, optional=True, tooltip=(
                    "A Perfusion concept, a small file with a bias that composes with others; or the tuned model of "
                    "the paper, kept as a difference of some MB, which also changes prompts without the word."
                )),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=(
                    "Only for a domain that was pretrained with CLIP vision, and then the same one, from Load CLIP "
                    "Vision. Other domains do not look at it."
                )),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        """A tuning that was cancelled is not taken from the cache when it is queued again."""
        return stops(cls, inputs)

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        def learn(one, photos, *how):
            domain = checked(one["domain"], one["model"], one["clip"])
            vision = vision_for(domain, one.get("clip_vision"))
            word, steps, seed = one["placeholder"].strip(), one["steps"], one["seed"]
            if one.get("result") == TUNED:
                recipe = whole_recipe(domain, word, steps, seed)
                method = partial(TunedWhole, domain, photos, vision=vision)
            else:
                recipe = tuning_recipe(domain, one["clip"], word, steps, seed)
                method = partial(TunedEdit, domain, photos, precision(one["clip"]), fingerprint_of(one["clip"]),
                                 vision=vision)
            return recipe, learn_word(one["model"], one["clip"], one["vae"], photos, recipe, *how, method)

        return run(cls, inputs, learn)


def checked(domain: DomainValue, model, clip) -> DomainValue:
    """The domain, if it was learned for such models. Raises ValueError for one of another base or text encoder."""
    base = base_name(model)
    if domain.base != base:
        raise ValueError(f"The domain {domain.word!r} was pretrained on {domain.base} and this checkpoint is {base}; "
                         "load a domain for it, or a checkpoint of that base.")
    if domain.encoder.shape.words != widths(clip):
        raise ValueError(f"The domain {domain.word!r} gives words of {_sizes(domain.encoder.shape.words)} numbers, and "
                         f"this CLIP has words of {_sizes(widths(clip))}; load a checkpoint of {domain.base}.")
    if domain.text and domain.text != fingerprint_of(clip):
        log.warning("The domain %r was pretrained with another text encoder than this one; more steps may be needed.",
                    domain.word)
    warn_of_other_prediction(f"The domain {domain.word!r}", domain.metadata, model)
    return domain


def _sizes(words) -> str:
    return " and ".join(f"{size} ({name})" for name, size in words.items())

"""Sentences around the word while it is learned; {} is its place."""

import re

OBJECT = (
    "{}",
    "a {}",
    "one {}",
    "the {}",
    "my {}",
    "a photo of a {}",
    "a picture of my {}",
    "an image of the {}",
    "a close-up photo of one {}",
    "a nice picture of a {}",
)
STYLE = (
    "in the style of {}",
    "a picture in the style of {}",
    "a drawing made in the style of {}",
    "a scene painted the way of {}",
    "{} style",
    "a small study in the {} style",
)
PLACES = (
    "a {} on the beach",
    "a {} in the snow",
    "my {} on a table",
    "a photo of a {} in the city",
    "a {} at night",
    "a picture of a {} in the grass",
    "the {} in a garden",
    "one {} next to a tree",
)
AMONG_OTHERS = (
    "a dog and a {}",
    "a {} and a chair",
    "a red car left of a {}",
    "a {} left of a house",
    "a tree next to the {}",
    "a bird on a {} at night",
    "a {} on a table",
    "a small {} in front of a wall",
    "my green {} in the snow",
    "a picture of a man with a {} and a ball",
)
BY_KIND = {"object": OBJECT, "style": STYLE, "object in places": OBJECT + PLACES}


def sentences(kind: str, own: str) -> tuple[str, ...]:
    """The sentences of `kind`, or the lines of `own` when there are any. Raises ValueError for a line without {}."""
    lines = tuple(line.strip() for line in own.splitlines() if line.strip())
    for line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"Each sentence needs the place of the word once, written {{}}: {line!r} does not.")
    return lines or BY_KIND[kind]


def fill(sentence: str, word: str) -> str:
    """Puts `word` at its place; other braces stay as they are, as dynamic-prompt users expect."""
    return sentence.replace("{}", word)


def sentence_of(caption: str, placeholder: str, init_text: str) -> str:
    """A photo's own caption as a sentence: the word goes where {} or the placeholder stands, else where the init text
    does, else in front."""
    for text in ("{}", placeholder, init_text):
        pattern = re.compile(rf"(?<![\w-]){re.escape(text)}(?![\w-])", re.IGNORECASE)
        if pattern.search(caption):
            return pattern.sub("{}", caption, count=1)
    return f"{{}}, {caption}"

"""The pack in a real server over HTTP, as the editor drives it."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import pytest
import torch
from concepts_pack.microworld.client import ComfyError, choose, to_prompt
from PIL import Image
from safetensors.torch import save_file

from .conftest import outcome
from .in_process import test_e4t_import as toy_release

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TRAIN = "ConceptsTrainTextualInversion"


@pytest.fixture(scope="module")
def info(client):
    """Every node's schema as the server tells it."""
    return client.object_info()


def example(info, name="textual_inversion", steps=2):
    """Return an example workflow as a prompt that trains for a moment only."""
    path = ROOT / "example_workflows" / f"{name}.json"
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), info)
    for node in prompt.values():
        if node["class_type"].startswith("ConceptsTrain"):
            choose(node["inputs"], info[node["class_type"]], "preset", "own settings", steps=steps)
        elif node["class_type"] == "ConceptsPretrainE4T":
            node["inputs"] |= {"steps": steps, "batch_size": 2}
        elif node["class_type"] == "ConceptsTuneE4T":
            node["inputs"]["steps"] = steps
    return prompt


def quickly(prompt):
    """The prompt with two steps wherever something is drawn."""
    for node in prompt.values():
        node["inputs"] |= {name: 2 for name in ("steps", "preview_steps") if name in node["inputs"]}
    return prompt


def the(prompt, kind):
    """Return the inputs of the node of this type."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


async def texts(client, prompt):
    """What the server puts under nodes while it runs a prompt, by node."""
    address, found = f"{client.url}/ws?clientId={client.id}", {}
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        await asyncio.to_thread(client.post, "/prompt", {"prompt": prompt, "client_id": client.id})
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY and message.data[:4] == bytes([0, 0, 0, 3]):
                start = 8 + int.from_bytes(message.data[4:8], "big")
                found[message.data[8:start].decode()] = message.data[start:].decode()
            elif message.type is aiohttp.WSMsgType.TEXT and message.json()["type"] == "executing":
                if message.json()["data"]["node"] is None:
                    return found


def still_works(client):
    """Tell whether the server runs a small prompt to its end."""
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["image", 0]}}
    return len(client.images(client.run({"image": image, "preview": preview})["preview"])) == 1


def test_nodes_are_offered(info):
    ours = {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.ComfyUI-Concepts"}
    assert TRAIN in ours and all(name.startswith("Concepts") for name in ours)
    for node in ours.values():
        assert node["description"] and node["category"].startswith("concepts")


def test_every_example_is_tested():
    assert WORKFLOWS


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_example_runs(client, info, name):
    heard = []
    prompt = quickly(example(info, name))
    outputs = client.run(prompt, lambda title, value, maximum: heard.append((value, maximum)))
    pictures = [client.images(outputs[key]) for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert pictures and all(data.startswith(b"\x89PNG") for images in pictures for data in images)
    assert heard


def test_training_is_reused_for_another_text(client, info):
    prompt = quickly(example(info))
    client.run(prompt)
    titles = set()
    the(prompt, "KSampler")["seed"] += 1
    client.run(prompt, lambda title, *_: titles.add(title))
    trainer = next(node["_meta"]["title"] for node in prompt.values() if node["class_type"] == TRAIN)
    assert titles and trainer not in titles


def test_an_example_queued_again_keeps_what_was_saved_before(client, server, info):
    """A user who tries one on photos of their own may have a concept of that name."""
    prompt = quickly(example(info))
    client.run(prompt)
    folder = server[1] / "models" / "embeddings"
    before = {path: path.read_bytes() for path in folder.glob("mine*.safetensors")}
    the(prompt, TRAIN)["seed"] += 1
    client.run(prompt)
    after = {path: path.read_bytes() for path in folder.glob("mine*.safetensors")}
    assert before and before.items() < after.items()


def test_bad_input_is_refused_in_one_sentence(client, info):
    prompt = example(info)
    the(prompt, TRAIN)["init_text"] = ""
    with pytest.raises(ComfyError) as error:
        client.run(prompt)
    assert TRAIN in str(error.value) and "\n" not in str(error.value)
    assert still_works(client)


@pytest.mark.parametrize("name", ["my cat", "", "con"])
def test_a_name_that_cannot_be_saved_under_is_told_before_the_training(client, info, name):
    """The host would run what else there is to see."""
    prompt = {key: node for key, node in example(info).items() if not node["class_type"].endswith("Image")}
    the(prompt, "ConceptsSave")["name"] = name
    with pytest.raises(ComfyError, match="ConceptsSave: .*(cannot name a file|Windows cannot open)"):
        client.run(prompt)
    assert json.loads(client.get("/queue")) == {"queue_running": [], "queue_pending": []}


def test_what_a_node_says_stands_under_it(client, info):
    """As text that the editor, which takes it as HTML, shows whole."""
    wanted = ("CheckpointLoaderSimple", "ConceptsInline", "ConceptsInspect")
    prompt = {key: node for key, node in example(info, "perfusion_inline").items() if node["class_type"] in wanted}
    the(prompt, "ConceptsInline")["text"] += "\n"  # so that it is not cached
    told = {prompt[key]["class_type"]: text for key, text in asyncio.run(texts(client, prompt)).items()}
    assert told["ConceptsInline"].startswith("&lt;mine&gt;: ") and "checksum" in told["ConceptsInline"]
    assert "&lt;mine&gt;" in told["ConceptsInspect"] and "\n" in told["ConceptsInspect"]


def test_number_out_of_range_is_refused(client, info):
    prompt = example(info, steps=0)
    with pytest.raises(ComfyError, match=f"{TRAIN}: .*steps"):
        client.run(prompt)


def test_cancel_during_training_keeps_what_was_learned(client, info):
    prompt = example(info, steps=100_000)
    started = threading.Event()
    threading.Thread(target=lambda: (started.wait(), client.interrupt()), daemon=True).start()
    trainer = next(node["_meta"]["title"] for node in prompt.values() if node["class_type"] == TRAIN)
    outputs = client.run(prompt, lambda title, *_: title == trainer and started.set())
    saved = next(key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    assert client.images(outputs[saved])
    assert still_works(client)


def test_cancelled_training_with_linked_widgets_goes_on_when_queued_again(client, info):
    prompt = example(info, steps=100_000)
    inputs = the(prompt, TRAIN)
    for name, kind in (("init_text", "String"), ("seed", "Int"), ("preset.batch_size", "Int")):
        prompt[name] = {"class_type": f"Primitive{kind}", "inputs": {"value": inputs[name]}}
        inputs[name] = [name, 0]
    title = next(node["_meta"]["title"] for node in prompt.values() if node["class_type"] == TRAIN)
    done = []
    for _ in range(2):
        steps, started = [], threading.Event()
        threading.Thread(target=lambda begun=started: (begun.wait(), client.interrupt()), daemon=True).start()

        def heard(node, step, _, steps=steps, begun=started):
            if node == title:
                steps.append(step)
                if len(steps) > 2:
                    begun.set()

        client.run(prompt, heard)
        done.append(steps)
    assert done[1] and done[0][-1] < done[1][0]


def test_cancel_during_sampling_leaves_the_server_usable(client, info):
    prompt = example(info)
    the(prompt, "KSampler")["steps"] = 10_000
    started = threading.Event()
    threading.Thread(target=lambda: (started.wait(), client.interrupt()), daemon=True).start()
    with pytest.raises(ComfyError, match="Cancelled"):
        client.run(prompt, lambda _, __, maximum: maximum == 10_000 and started.set())
    assert still_works(client)


def test_nodes_whose_names_are_linked_are_reused(client, server, models):
    """The host asks them for changes before it knows what is linked, and reuses nothing behind one that raises."""
    save_file({"emb_params": torch.randn(1, 256)}, models / "embeddings" / "linked.safetensors")
    save_file({"bundle_emb.linked.string_to_param.*": torch.randn(1, 256)}, models / "loras" / "linked.safetensors")
    photos = server[1] / "input" / "linked"
    photos.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(photos / "1.png")
    (models / "e4t" / "linked").mkdir(parents=True)
    toy_release.write(models / "e4t" / "linked" / "cats", toy_release.TRAINED, encoder=toy_release.weights(),
                      weight_offsets=toy_release.OFFSETS)
    prompt = {}
    for kind, widget, value, output, others in (
        ("LoadPhotos", "folder", "linked", 2, {}), ("LoadDomain", "name", "teddy.safetensors", 1, {}),
        ("Load", "name", "linked.safetensors", 1, {"placeholder": ""}),
        ("LoadLoraWords", "name", "linked.safetensors", 1, {}),
        ("ImportE4T", "folder", "linked/cats", 2, {"name": "imported/linked"}),
    ):  # fmt: skip
        prompt |= {
            f"{kind} name": {"class_type": "PrimitiveString", "inputs": {"value": value}},
            f"{kind} link": {"class_type": "ComfySwitchNode", "inputs": {  # a text does not fit a list as it is
                "switch": True, "on_true": [f"{kind} name", 0], "on_false": [f"{kind} name", 0],
            }},
            kind: {"class_type": f"Concepts{kind}", "inputs": {widget: [f"{kind} link", 0], **others}},
            f"{kind} shown": {"class_type": "PreviewAny", "inputs": {"source": [kind, output]}},
        }  # fmt: skip
    first, again = (client.post("/prompt", {"prompt": prompt, "client_id": client.id}) for _ in range(2))
    told = outcome(client, json.loads(again)["prompt_id"])
    assert outcome(client, json.loads(first)["prompt_id"])["execution_success"] and told["execution_success"]
    assert set(told["execution_cached"]["nodes"]) >= {name for name in prompt if " " not in name}


def test_a_release_is_imported_and_met_by_a_model_of_another_base(client, server, info):
    """A folder of downloads becomes a file that is listed, on a graph with the sample model."""
    folder = server[1] / "models" / "e4t" / "downloads"
    folder.mkdir(parents=True)
    toy_release.write(folder / "cats", toy_release.TRAINED, encoder=toy_release.weights(),
                      weight_offsets=toy_release.OFFSETS)
    offered = client.object_info()["ConceptsImportE4T"]["input"]["required"]["folder"]
    assert "downloads/cats" in str(offered)
    given = {"folder": "downloads/cats", "name": "imported/cats"}
    outputs = client.run({"import": {"class_type": "ConceptsImportE4T", "inputs": given}})
    assert "choose imported/cats.safetensors in Load E4T Domain" in str(outputs["import"])
    prompt = example(info, "e4t_one_picture")
    the(prompt, "ConceptsLoadDomain")["name"] = "imported/cats.safetensors"
    with pytest.raises(ComfyError, match="ConceptsTuneE4T: .*The domain 'cat' was pretrained on SD15"):
        client.run(prompt)
    assert still_works(client)


def test_demo_leaves_its_pictures(tmp_path):
    """The README's command from its start to its end, with a training of two steps."""
    command = [sys.executable, ROOT / "dev.py", "demo", "--steps", "2", "--out", tmp_path]
    env = {**os.environ, "COMFYUI_PYTHON": sys.executable}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    sheets = (f"Contact sheet: {tmp_path / 'contact_sheet.png'}\nOne slider:    {tmp_path / 'slider.png'}\n"
              f"One picture:   {tmp_path / 'one_picture.png'}\n")
    assert result.stdout.endswith(f"{sheets}All pictures:  {tmp_path}\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"contact_sheet.png", "one_picture.png", "one-picture-photo-1.png", "training-1.png", "photo-4.png",
                     "scene-8-learned-word-2.png", "server.log"}
    assert len([name for name in names if name.startswith("bias-")]) == 12

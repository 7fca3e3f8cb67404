"""Talks to a running ComfyUI: turns a saved workflow into a prompt, runs it, fetches its pictures.

    client = Client("http://127.0.0.1:8188")
    prompt = to_prompt(json.load(open("workflow.json")), client.object_info())
    history = client.run(prompt, print)
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # its choice decides which widgets follow, called `name.inner`
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
NOTES = ("Note", "MarkdownNote")


class ComfyError(Exception):
    """What the server said went wrong, with the node's name."""


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """Convert a workflow as the editor saves it into the prompt that /prompt takes."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    unknown = sorted({node["type"] for node in nodes} - object_info.keys())
    if unknown:
        raise ComfyError(f"The server does not know {', '.join(unknown)}: did the pack load? Its log says why not.")
    return {str(node["id"]): prompt_node(node, object_info[node["type"]], links) for node in nodes}


def prompt_node(node: dict, info: dict, links: dict) -> dict:
    """Return one node of a prompt: its widgets by name, then the links that override them."""
    inputs = named_widgets(node.get("widgets_values") or [], info)
    inputs |= {slot["name"]: links[slot["link"]] for slot in node.get("inputs", ()) if slot.get("link") is not None}
    return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node.get("title", node["type"])}}


def named_widgets(values: list | dict, info: dict) -> dict:
    """Give widget values, which a workflow stores by position, their names; those left out have their defaults."""
    if isinstance(values, dict):
        return {name: values[name] for name, _, _ in widgets(info) if name in values}
    queue, named, waiting = list(values), {}, list(widgets(info))
    while queue and waiting:
        name, kind, options = waiting.pop(0)
        named[name] = queue.pop(0)
        if kind == DYNAMIC:
            chosen = next(option for option in options["options"] if option["key"] == named[name])
            waiting[:0] = [(f"{name}.{inner}", *rest) for inner, *rest in widgets({"input": chosen["inputs"]})]
        if kind == "INT" and queue and has_extra_widget(name, options) and queue[0] in AFTER_GENERATE:
            queue.pop(0)
        if options.get("image_upload") and queue:
            queue.pop(0)
    return named | {name: options["default"] for name, _, options in waiting if "default" in options}


def widgets(info: dict) -> Iterator[tuple[str, str, dict]]:
    """Yield name, type and options of each input that the editor shows as a widget, in order."""
    for section in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            kind = "COMBO" if isinstance(kind, list) else kind
            if kind in (*WIDGETS, DYNAMIC) and not options.get("forceInput"):
                yield name, kind, options


def choose(inputs: dict, info: dict, name: str, key: str, **values) -> None:
    """Make a choice that brings widgets of its own in a node's inputs, and give those `values` or their defaults."""
    shown = next(option["inputs"] for option in info["input"]["required"][name][1]["options"] if option["key"] == key)
    inputs[name] = key
    for inner, _, options in widgets({"input": shown}):
        inputs[f"{name}.{inner}"] = values.get(inner, options.get("default"))


def has_extra_widget(name: str, options: dict) -> bool:
    """Tell whether the editor adds a "control after generate" widget behind this number."""
    return bool(options.get("control_after_generate")) or name in ("seed", "noise_seed")


class Client:
    """One ComfyUI server."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, **query: str) -> bytes:
        """GET a path of the server."""
        return self.open(f"{path}?{urllib.parse.urlencode(query)}")

    def post(self, path: str, body: dict) -> bytes:
        """POST JSON to a path of the server."""
        return self.open(path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def open(self, path: str, data: bytes | None = None, headers: dict | None = None) -> bytes:
        """Answer a request's body, or raise what the server objects to."""
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with self.opener.open(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            refused = path == "/prompt" and body.startswith("{")
            raise ComfyError(rejection(json.loads(body)) if refused else f"{path}: {error}") from error

    def object_info(self) -> dict:
        """Return every node's schema."""
        return json.loads(self.get("/object_info"))

    def interrupt(self) -> None:
        """Press Cancel."""
        self.post("/interrupt", {})

    def run(self, prompt: dict, progress: Callable[[str, int, int], None] = lambda *_: None) -> dict:
        """Run a prompt and return its outputs by node id; `progress` hears title, value and maximum."""
        return asyncio.run(self.run_async(prompt, progress))

    async def run_async(self, prompt: dict, progress: Callable[[str, int, int], None]) -> dict:
        """Submit with an open socket, so that no message is missed."""
        address = f"{self.url}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            body = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": self.id})
            answer = json.loads(body)
            if answer["node_errors"]:
                raise ComfyError(rejection(answer))
            prompt_id = answer["prompt_id"]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT and finished(message.json(), prompt_id, prompt, progress):
                    return json.loads(await asyncio.to_thread(self.get, f"/history/{prompt_id}"))[prompt_id]["outputs"]
        raise ComfyError("The server went away while it was working; its log says why.")

    def images(self, output: dict) -> list[bytes]:
        """Fetch the image files of one node's output."""
        fields = ("filename", "subfolder", "type")
        return [self.get("/view", **{field: image[field] for field in fields}) for image in output.get("images", ())]

    def save_images(self, output: dict, folder: Path, stem: str) -> list[Path]:
        """Write one node's images as stem-1.png, stem-2.png, …"""
        paths = []
        for number, data in enumerate(self.images(output), 1):
            paths.append(folder / f"{stem}-{number}.png")
            paths[-1].write_bytes(data)
        return paths


def finished(message: dict, prompt_id: str, prompt: dict, progress: Callable[[str, int, int], None]) -> bool:
    """Pass progress on and tell whether the prompt is done; raise if it failed or was cancelled."""
    kind, data = message["type"], message["data"]
    if data.get("prompt_id") != prompt_id:
        return False
    if kind == "execution_error":
        raise ComfyError(f"{data['node_type']}: {data['exception_message'].strip()}")
    if kind == "execution_interrupted":
        raise ComfyError("Cancelled.")
    if kind == "progress":
        progress(title(prompt, data.get("node")), data["value"], data["max"])
    return kind == "executing" and data["node"] is None


def title(prompt: dict, node_id: str | None) -> str:
    """Return what the editor calls a node."""
    node = prompt.get(node_id) or {"class_type": str(node_id)}
    return node.get("_meta", {}).get("title", node["class_type"])


def rejection(answer: dict) -> str:
    """Put the server's objections to a prompt into one line."""
    errors = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    return "; ".join(errors) or answer["error"]["message"]

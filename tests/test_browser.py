"""The example workflows in ComfyUI's own editor, in a real browser."""

import json
import shutil
from pathlib import Path

import pytest
from concepts_pack.microworld.client import to_prompt

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="There is no chromium on this machine")

EXAMPLES = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "example_workflows").glob("*.json"))
OPEN_TEMPLATE = """async name => {
    const answer = await fetch(`/api/workflow_templates/ComfyUI-Concepts/${name}.json`)
    await app.loadGraphData(await answer.json())
}"""
RED_NODES = """() => app.graph.nodes
    .filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))
    .map(node => node.type)"""
HIDDEN = """() => {
    const box = ({pos: [x, y], size: [w, h]}) => [x, y - LiteGraph.NODE_TITLE_HEIGHT, x + w, y + h]
    const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
    const within = (a, b) => b[0] <= a[0] && b[1] <= a[1] && a[2] <= b[2] && a[3] <= b[3]
    const nodes = app.graph.nodes.map(node => [node.title, box(node)])
    const groups = app.graph.groups.map(({pos: [x, y], size: [w, h]}) => [x, y, x + w, y + h])
    const covered = nodes.filter(([, own], i) => nodes.slice(i + 1).some(([, other]) => meet(own, other)))
    const outside = nodes.filter(([, own]) => groups.some(group => meet(own, group) && !within(own, group)))
    return [...covered, ...outside].map(([title]) => title)
}"""
PROMPT = "async () => (await app.graphToPrompt()).output"
WIDGETS = """() => {
    const node = app.graph.nodes.find(node => node.type === 'ConceptsTrainTextualInversion')
    return Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]))
}"""
SET = """([name, value]) => {
    const node = app.graph.nodes.find(node => node.type === 'ConceptsTrainTextualInversion')
    const widget = node.widgets.find(widget => widget.name === name)
    widget.value = value
    widget.callback?.(value)
}"""


@pytest.fixture(scope="module")
def editor(server):
    """The editor as a newcomer's browser shows it."""
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM) as browser:
        page = browser.new_page()
        page.goto(server[0])
        page.wait_for_function("window.app?.graph && 'ConceptsSave' in LiteGraph.registered_node_types")
        yield page


def inputs(prompt):
    """What each node of a prompt is given."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_template_opens_whole_and_is_queued_as_saved(editor, client, name):
    editor.evaluate(OPEN_TEMPLATE, name)
    assert editor.evaluate(RED_NODES) == []
    assert editor.evaluate(HIDDEN) == []  # at the sizes that the editor gives them
    saved = json.loads(client.get(f"/api/workflow_templates/ComfyUI-Concepts/{name}.json"))
    assert inputs(editor.evaluate(PROMPT)) == inputs(to_prompt(saved, client.object_info()))


def test_own_settings_bring_up_their_numbers_and_keep_them_when_saved(editor, client):
    editor.evaluate(OPEN_TEMPLATE, "textual_inversion")
    widgets = editor.evaluate(WIDGETS)
    assert widgets["preset"] == "quick" and "preset.steps" not in widgets
    editor.evaluate(SET, ["preset", "own settings"])
    editor.evaluate(SET, ["preset.steps", 77])
    saved = editor.evaluate("() => app.graph.serialize()")
    expected = inputs(to_prompt(saved, client.object_info()))
    assert inputs(editor.evaluate(PROMPT)) == expected
    editor.evaluate("workflow => app.loadGraphData(workflow)", saved)
    widgets = editor.evaluate(WIDGETS)
    assert widgets["preset"] == "own settings" and widgets["preset.steps"] == 77
    assert inputs(editor.evaluate(PROMPT)) == expected


def test_a_node_that_is_missing_is_red(editor, client):
    """So that the check for red nodes above means something."""
    workflow = client.get("/api/workflow_templates/ComfyUI-Concepts/textual_inversion.json")
    broken = json.loads(workflow.replace(b'"ConceptsApply"', b'"ConceptsGone"'))
    editor.evaluate("workflow => app.loadGraphData(workflow)", broken)
    assert editor.evaluate(RED_NODES) == ["ConceptsGone"]

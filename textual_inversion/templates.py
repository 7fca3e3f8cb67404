"""Sentences around the word while it is learned; {} is its place."""

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
BY_KIND = {"object": OBJECT, "style": STYLE}


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

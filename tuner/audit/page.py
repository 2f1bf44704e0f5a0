"""The audit as a page to look at: one HTML file with all its pictures inside."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from tuner.audit.findings import SEVERITIES, Finding

SHOWN = 200
"""Findings of a kind that the page lists; the JSON has them all."""
DRAWN, FILES = 20, 4
"""Of so many findings of a kind, so many of their pictures are drawn."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1e }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem }
code { font-size: .92em; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% } td, th { padding: .35rem .6rem; text-align: left; vertical-align: top;
border-bottom: 1px solid #ddd } .error { color: #b00020 } .warning { color: #9a5b00 } .note { color: #555 }
.bar { background: #4a7dbd; height: .8rem; display: inline-block } img { border: 1px solid #ccc; width: 100% }
.sample { display: grid; grid-template-columns: minmax(16rem, 33rem) 1fr; gap: 1rem; margin: 1rem 0;
border-bottom: 1px solid #ddd; padding-bottom: 1rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; align-items: start }
.small img { width: auto; height: 4rem; margin: .3rem .3rem 0 0; vertical-align: top }
.token { background: #eef2f8; padding: 0 .2rem; margin: .1rem;
display: inline-block; border-radius: 3px } .cut { background: #f6d5d5; text-decoration: line-through }
figure { margin: 0 } figcaption { color: #555; font-size: .85em }
"""


@dataclass(frozen=True)
class Sample:
    """One showing of a picture, after everything that is done to it."""

    name: str
    seen: Image.Image
    """Cut, scaled and mirrored, as the autoencoder gets it."""
    decoded: Image.Image
    """What the autoencoder makes of its latents: what the model can learn at best."""
    beside: Mapping[str, Image.Image]
    """Its mask, and what the model is told of it; by what is said of each."""
    caption: str
    tokens: Sequence[str]
    most: int
    """So many of the tokens are seen."""
    facts: Mapping[str, str]


def page(
    title: str,
    findings: Sequence[Finding],
    facts: Mapping[str, str],
    buckets: Mapping[tuple[int, int], int],
    samples: Sequence[Sample],
    small: Callable[[str], Image.Image | None],
) -> str:
    """The page's HTML; `small` draws the picture in a file, where there is one in it."""
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    said = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items())
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1><p>{said}</p>",
        "<table>", *(f"<tr><th>{escape(k)}<td>{escape(v)}" for k, v in facts.items()), "</table>",
        "<h2>Findings</h2>", _findings(findings, small),
        "<h2>Buckets</h2>", _buckets(buckets),
        "<h2>What the model will see</h2>", *map(_sample, samples), "</html>",
    ]  # fmt: skip
    return "\n".join(parts)


def _findings(findings: Sequence[Finding], small: Callable[[str], Image.Image | None]) -> str:
    if not findings:
        return "<p>Nothing is wrong.</p>"
    rows: list[str] = []
    listed: dict[str, int] = {}
    for finding in sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.kind)):
        listed[finding.kind] = listed.get(finding.kind, 0) + 1
        if listed[finding.kind] <= SHOWN:
            drawn = [small(file) for file in finding.files[:FILES]] if listed[finding.kind] <= DRAWN else []
            pictures = "".join(_image(picture) for picture in drawn if picture is not None)
            rows.append(
                f"<tr><td class={finding.severity}>{finding.severity}<td>{escape(finding.kind)}"
                f"<td><code>{escape(finding.message)}</code><div class=small>{pictures}</div>"
            )
    more = {kind: count - SHOWN for kind, count in listed.items() if count > SHOWN}
    left = "".join(f"<p>{count} more of the kind {escape(kind)} are in report.json</p>" for kind, count in more.items())
    return f"<table class=findings>{''.join(rows)}</table>{left}"


def _buckets(buckets: Mapping[tuple[int, int], int]) -> str:
    most = max(buckets.values(), default=1)
    rows = [
        f"<tr><td>{w} x {h}<td>{count}<td><span class=bar style='width:{20 * count / most:.2f}rem'></span>"
        for (w, h), count in sorted(buckets.items(), key=lambda each: each[0][0] / each[0][1])
    ]
    return f"<table><tr><th>width x height<th>pictures<th>{''.join(rows)}</table>"


def _sample(sample: Sample) -> str:
    tokens = "".join(
        f"<span class='token{' cut' if index >= sample.most else ''}'>{escape(token)}</span>"
        for index, token in enumerate(sample.tokens)
    )
    facts = "<br>".join(f"{escape(key)}: {escape(value)}" for key, value in sample.facts.items())
    shown = {"as it is cut": sample.seen, "through the autoencoder": sample.decoded, **sample.beside}
    figures = "".join(
        f"<figure>{_image(picture)}<figcaption>{escape(said)}</figcaption></figure>" for said, picture in shown.items()
    )
    caption = escape(sample.caption) or "<i>empty caption</i>"
    return (
        f"<div class=sample><div class=figures>{figures}</div><div><code>{escape(sample.name)}</code>"
        f"<p>{caption}</p><p>{tokens}</p><p>{facts}</p></div></div>"
    )


def _image(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((512, 512))
    written = io.BytesIO()
    small.save(written, "png")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}'>"

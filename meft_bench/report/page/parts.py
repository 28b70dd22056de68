"""What the page is made of: its style, verdict badges, and figures inlined with ids of their own."""

import re
from html import escape
from xml.etree import ElementTree

_SHAPES = {
    "supported": '<path d="M1.5 6.5 L4.8 9.8 L10.5 2.5" fill="none" stroke="currentColor" stroke-width="2.4"/>',
    "contradicted": '<path d="M2 2 L10 10 M10 2 L2 10" fill="none" stroke="currentColor" stroke-width="2.4"/>',
    "inconclusive": '<path d="M6 1 L11 6 L6 11 L1 6 Z" fill="none" stroke="currentColor" stroke-width="1.6"/>'
    '<path d="M6 1 L11 6 L6 11 Z" fill="currentColor"/>',
    "not run": '<circle cx="6" cy="6" r="4.4" fill="none" stroke="currentColor" stroke-width="1.6" '
    'stroke-dasharray="2.4 1.6"/>',
    "no test": '<path d="M2 6 L10 6" fill="none" stroke="currentColor" stroke-width="2"/>',
}
"""Verdict -> its mark in a box of 12 x 12; the word and the colour stand beside it."""
_WORDS = {"holds": "supported", "fails": "contradicted", "open": "inconclusive"}
"""What a part is called -> whose mark and colour it takes."""
_URL = re.compile(r"url\(#([^)]+)\)")
_FOREIGN_URL = re.compile(r"url\((?!#)")
_EVERYTHING = re.compile(r"\*\{([^{}<>]*)\}\s*$")
_REFUSED = {"script", "foreignObject", "image", "a", "iframe"}
_PT = 4 / 3
"""CSS pixels."""


def badge(verdict: str) -> str:
    """A verdict as a word with a shape and a colour of its own, so that none of them is needed to tell it."""
    like = _WORDS.get(verdict, verdict)
    shape = f'<svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{_SHAPES[like]}</svg>'
    return f'<span class="badge {like.replace(" ", "-")}">{shape}{escape(verdict)}</span>'


def inline_svg(name: str, content: bytes, title: str) -> str:
    """A drawing as part of the page: ids prefixed with its name (matplotlib gives every drawing the same), no metadata.

    Raises ValueError when it is no SVG, or reaches outside itself.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"figure {name} is no SVG ({error})") from None
    if _local(root.tag) != "svg" or "viewBox" not in root.attrib:
        raise ValueError(f"figure {name} is no SVG with a viewBox")
    box = root.attrib["viewBox"]
    style = _clean(root, name)
    width = round(float(box.split()[2]) * _PT)
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": title, "style": f"{style}max-width:{width}px"}
    return ElementTree.tostring(root, encoding="unicode").strip()


def _clean(root: ElementTree.Element, name: str) -> str:
    """Rename ids and tags in place; returns the style that the drawing had for everything inside it."""
    style = ""
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) == "metadata":
                parent.remove(child)
            elif _local(child.tag) == "style":
                # A style element holds for the whole page: what it says of everything is inherited from the root.
                found = _EVERYTHING.match((child.text or "").strip())
                if found is None:
                    raise ValueError(f"figure {name} has a style that the page cannot take: {child.text!r}")
                style += found[1].strip().rstrip(";") + ";"
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in _REFUSED:
            raise ValueError(f"figure {name} has <{element.tag}>, which the page does not take")
        element.attrib = {_local(k): _own(_local(k), v, name) for k, v in element.attrib.items()}
    return style


def _own(attribute: str, value: str, name: str) -> str:
    """The value with references to ids made the figure's own."""
    outside = (attribute == "href" and not value.startswith("#")) or _FOREIGN_URL.search(value)
    if attribute.startswith("on") or outside:
        raise ValueError(f"figure {name} reaches outside itself: {attribute}={value[:40]!r}")
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == "href":
        return f"#{name}-{value[1:]}"
    return _URL.sub(rf"url(#{name}-\1)", value)


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#586069;--page:#fff;--card:#f6f7f9;--line:#d4d8dd;--link:#0550ae;
--good:#116329;--bad:#a40e26;--open:#7d4e00;--none:#57606a}
@media (prefers-color-scheme:dark){:root{--ink:#e3e6ea;--soft:#a2abb5;--page:#14171b;--card:#1d2126;--line:#3a4149;
--link:#79b8ff;--good:#6fdd8b;--bad:#ff8f9c;--open:#f0b849;--none:#a9b3bd}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1rem 1rem 4rem;max-width:66rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.35rem;margin:3rem 0 .8rem;padding-top:.8rem;border-top:2px solid var(--line)}
nav h2{font-size:1.1rem;margin:1rem 0 .5rem;padding:0;border:0}
h3{font-size:1.1rem;margin:1.8rem 0 .5rem}
h4{font-size:1rem;margin:1.2rem 0 .3rem}
p,ul,dl{margin:.5rem 0}
ul{padding-left:1.3rem}
a{color:var(--link)}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.86rem;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600}
thead th{vertical-align:bottom;background:var(--card)}
.num{text-align:right}
.seeds{display:block;min-width:10.5rem}
.nowrap{white-space:nowrap}
.scroll{overflow-x:auto;margin:.7rem 0;border:1px solid var(--line);border-radius:6px}
.scroll>table{min-width:100%}
.scroll>table td:first-child{min-width:9rem}
.scroll>svg{display:block;width:100%;min-width:38rem;height:auto;margin:0 auto}
figure{margin:1.5rem 0 2.2rem}
figure .scroll{background:#fff;padding:.4rem}
figcaption{font-size:.92rem}
figcaption b{display:block;font-size:1.02rem}
.facts,.three{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.92rem}
.facts dt,.three dt{color:var(--soft)}
.facts dd,.three dd{margin:0;min-width:0;overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.92rem}
.badge{display:inline-flex;align-items:center;gap:.35em;padding:.05em .55em;border:1.5px solid;border-radius:1em;
font-size:.82rem;font-weight:600;line-height:1.5;white-space:nowrap;vertical-align:middle}
.badge svg{flex:none}
.supported{color:var(--good)}.contradicted{color:var(--bad)}.inconclusive{color:var(--open)}
.not-run,.no-test{color:var(--none);font-weight:500}
.claim,.difference{margin:1.2rem 0;padding:.2rem 1rem .8rem;border:1px solid var(--line);border-radius:8px}
.claim h4,.difference h4{border-top:1px solid var(--line);padding-top:.7rem}
.says{font-size:1.05rem}
.because{border-left:3px solid var(--bad);padding-left:.7rem}
details{font-size:.92rem;margin:.5rem 0}
summary{cursor:pointer;color:var(--link)}
.family th{background:var(--card);padding-top:.7rem}
.overview .small{display:block;color:var(--soft);font-size:.8rem;margin-top:.2rem}
@media (max-width:44rem){
.three{grid-template-columns:1fr}.three dd{margin-bottom:.3rem}
.claim,.difference{padding:.1rem .7rem .6rem}
.overview thead{display:none}
.overview tr,.overview td,.overview th{display:block;border:0}
.overview tr{padding:.4rem 0;border-bottom:1px solid var(--line)}
.overview td{padding:.1rem .6rem}
.overview td[data-is]::before{content:attr(data-is) ": ";color:var(--soft)}
.top{display:none}}
@media print{
:root{color-scheme:light;--ink:#000;--soft:#333;--page:#fff;--card:#f0f0f0;--line:#999;--link:#000;--good:#116329;
--bad:#a40e26;--open:#6b4300;--none:#444}
@page{size:A4;margin:14mm 12mm}
@page wide{size:A4 landscape}
section[aria-labelledby="tables"]{page:wide}
nav ul{columns:2}nav summary{display:none}
body{max-width:none;padding:0;font-size:10pt}
h2{break-before:page;break-after:avoid}
nav h2,#verdicts{break-before:auto}
h3,h4{break-after:avoid}
figure,tr,.difference,.claim{break-inside:avoid}
thead{display:table-header-group}
.scroll{overflow:visible;border:0}
.scroll>table{min-width:0;width:100%;font-size:7pt}
.scroll>table th,.scroll>table td,.scroll>table td:first-child{min-width:0;padding:.15rem .25rem;
overflow-wrap:break-word}
.scroll .badge,.scroll .soft,.overview .small{font-size:6.5pt}
.scroll .badge svg{width:7px;height:7px}
.seeds{min-width:0}
.scroll>svg{min-width:0}
a[href^="http"]::after{content:" (" attr(href) ")"}
details::details-content{content-visibility:visible;height:auto;display:block}
summary{list-style:none;color:inherit}
.top{display:none}}
"""

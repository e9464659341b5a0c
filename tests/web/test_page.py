"""What can be known of the pages without a browser: words, references, safety, size, contrast."""

import json
import re
from pathlib import Path

import pytest

from prairie.flywheel.gate import RULES

WEB = Path(__file__).parents[2] / "prairie" / "web"
FLYWHEEL = WEB.parent / "flywheel"
SOURCES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(WEB.iterdir())
    if path.suffix in {".html", ".js", ".css", ".svg"}
}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
PAGES = {name: text for name, text in SOURCES.items() if name.endswith(".html")}
HTML = "".join(PAGES.values())
ALL_CODE = HTML + "".join(text for name, text in SCRIPTS.items() if name != "strings.js")


def strings() -> dict[str, dict[str, str]]:
    text = SOURCES["strings.js"]
    return json.loads(text[text.index("/* json */") + len("/* json */") : text.index("; /* end */")])


# Words


def test_both_languages_have_the_same_keys_and_no_empty_word():
    languages = strings()
    assert set(languages) == {"en", "zh"}
    assert list(languages["en"]) == list(languages["zh"]), "the keys stand in the same order in both languages"
    assert not [(name, key) for name, words in languages.items() for key, word in words.items() if not word.strip()]


def test_both_languages_fill_in_the_same_values():
    languages = strings()
    holes = {
        name: {key: sorted(re.findall(r"\{\w+\}", word)) for key, word in words.items()}
        for name, words in languages.items()
    }
    assert holes["en"] == holes["zh"]


def test_chinese_is_written_in_chinese():
    same = {key for key, word in strings()["zh"].items() if not re.search(r"[\u4e00-\u9fff]", word)}
    assert same == {"settings.top_p", "language.other"}, "every other word has a Chinese form"


def test_every_word_that_is_asked_for_exists_and_every_word_is_used():
    known = set(strings()["en"])
    exact = set(re.findall(r'data-t(?:-label|-title|-placeholder)?="([^"]+)"', HTML))
    exact |= {key for key in known if f'"{key}"' in ALL_CODE}
    asked = set(re.findall(r'\bt\("([\w.]+)"\s*[,)]', ALL_CODE)) | exact
    assert asked <= known, f"asked for, but not written: {sorted(asked - known)}"
    stems = set(re.findall(r'\bt\("([\w.]+\.)" \+', ALL_CODE)) | set(re.findall(r"\bt\(`([\w.]+\.)\$\{", ALL_CODE))
    made = {key for key in known if any(key.startswith(stem) for stem in stems)}
    assert known == exact | made, f"written, but never shown: {sorted(known - exact - made)}"


def test_every_rule_of_the_gate_and_every_probe_has_its_words():
    """Reasons are told by rule and figures, so that the page says them in its own language."""
    languages = strings()
    for rule, sentence in RULES.items():
        for words in languages.values():
            assert sorted(re.findall(r"\{\w+\}", words[f"because.{rule}"])) == sorted(re.findall(r"\{\w+\}", sentence))
    assert len([key for key in languages["en"] if key.startswith("because.")]) == len(RULES)
    sources = [(FLYWHEEL / name).read_text(encoding="utf-8") for name in ("chat.py", "go.py", "probes.py")]
    probes = set(re.findall(r'(?:Probe\(|_share\(|name = )"([a-z ]+)"', "".join(sources)))
    assert len(probes) == 7 and probes == {key[6:] for key in languages["zh"] if key.startswith("probe.")}


# References and safety


def test_nothing_is_fetched_from_elsewhere():
    found = [
        (name, url)
        for name, text in SOURCES.items()
        for url in re.findall(r"(?:https?:)?//[a-z0-9][\w.-]*\.[a-z]{2,}[^\s\"']*", text)
    ]
    assert found == [("icon.svg", "http://www.w3.org/2000/svg")], "only SVG's own name may look like an address"
    assert not re.findall(r"url\(|@import", SOURCES["style.css"] + SOURCES["pages.css"])


@pytest.mark.parametrize("page", PAGES)
def test_every_page_forbids_itself_everything_foreign(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', PAGES[page])[1]
    assert "default-src 'none'" in policy
    allowed = {source for rule in policy.split(";") for source in rule.split()[1:]}
    assert allowed == {"'none'", "'self'", "data:"}
    assert not re.search(r"\s(?:on\w+|style)=", PAGES[page]), "the policy would block inline handlers and styles"


def test_every_local_reference_exists():
    for address in re.findall(r'(?:src|href)="([^"#][^"]*)"', HTML):
        if address in ("./", "go", "studio"):
            continue
        assert address.startswith("static/"), f"{address}: relative, so that the page works behind a path prefix"
        assert (WEB / address.removeprefix("static/")).is_file(), address
    for name, text in SCRIPTS.items():
        for address in re.findall(r'\bfrom "([^"]+)"', text):
            assert address.startswith("./") and (WEB / address[2:]).is_file(), f"{name} imports {address}"
    drawn = set(re.findall(r'href="#i-([\w-]+)"', HTML)) | set(
        re.findall(r'\bicon(?:Button)?\("([\w-]+)"[,)]', ALL_CODE)
    )
    drawn |= {f"theme-{theme}" for theme in ("auto", "light", "dark")}
    assert drawn <= set(re.findall(r'<symbol id="i-([\w-]+)"', HTML))


def test_text_never_becomes_markup():
    banned = (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser",
        "createContextualFragment", "setHTML", "srcdoc",
    )  # fmt: skip
    assert not [(name, word) for name, text in SCRIPTS.items() for word in banned if word in text]


def test_every_key_handler_waits_for_the_input_method():
    assert re.search(r"if \(event\.isComposing \|\| event\.keyCode === 229\) return false;", SCRIPTS["dom.js"])
    handlers = 0
    for name, text in SCRIPTS.items():
        for start in re.finditer(r'addEventListener\("key(?:down|press|up)", \(event\) => \{\s*(.*)', text):
            handlers += 1
            assert re.match(r"if \((!isSendKey|isComposing)\(event\)", start[1]), (
                f"{name}: {start[1]} does not ask first"
            )
    assert handlers >= 4
    assert sum(len(re.findall(r"key(?:down|press|up)", text)) for text in SCRIPTS.values()) == handlers


def test_labels():
    for tag in re.findall(r"<(?:input|textarea|select)\b[^>]*>", HTML):
        name = re.search(r'id="([^"]+)"', tag)[1]
        wrapped = re.search(rf"<label[^>]*>(?:(?!</label>).)*{re.escape(tag)}", HTML)
        assert "data-t-label" in tag or f'for="{name}"' in HTML or wrapped, f"{tag} has no label"
    for tag in re.findall(r'<button[^>]*class="(?:icon-button|round)[^>]*>', HTML):
        assert "data-t-label" in tag or 'id="theme"' in tag, f"{tag} has no name"


def test_small():
    assert sum(len(text.encode()) for text in SOURCES.values()) < 200_000


# Colours (WCAG 2.2, contrast of text at least 4.5 to 1)


def palettes() -> dict[str, dict[str, str]]:
    css = SOURCES["style.css"]
    blocks = {
        "light": re.search(r"^:root \{(.*?)^\}", css, re.S | re.M)[1],
        "dark": re.search(r'^:root\[data-theme="dark"\] \{(.*?)^\}', css, re.S | re.M)[1],
        "dark by the system": re.search(r':root:not\(\[data-theme="light"\]\) \{(.*?)\}', css, re.S)[1],
    }
    return {name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for name, block in blocks.items()}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_is_the_same_by_switch_and_by_system():
    assert palettes()["dark"] == palettes()["dark by the system"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        *((text, ground) for text in ("ink", "soft", "faint") for ground in ("paper", "surface", "raised")),
        *(("ink", ground) for ground in ("bubble", "tint")),
        *(("accent", ground) for ground in ("paper", "surface", "raised", "tint")),
        ("on-accent", "accent"), ("wheat", "wheat-tint"), ("wheat", "paper"), ("danger", "danger-tint"),
        ("danger", "paper"), ("paper", "ink"),
    ],
)  # fmt: skip
def test_text_can_be_read(theme, text, ground):
    colours = palettes()[theme]
    assert contrast(colours[text], colours[ground]) >= 4.5

"""The documentation site: it builds strictly, is complete, says what the terminal says, and needs no network."""

import html
import os
import re
import resource
import subprocess
import sys

import pytest
from axe_playwright_python.sync_playwright import Axe

import isograd
from isograd._cli import cli
from isograd._explain import explain
from isograd._statistics import STATISTICS
from isograd._terminal import render
from isograd.remedies import REMEDIES
from isograd.rules import RULES

HOMES = dict.fromkeys(RULES, "rules") | dict.fromkeys(REMEDIES, "remedies") | dict.fromkeys(STATISTICS, "statistics")
WRITTEN = ["index", "tutorial", "guard", "theory", "folklore"]


@pytest.fixture(scope="session")
def docs(repository):
    return repository / "docs"


@pytest.fixture(scope="session")
def site(repository, tmp_path_factory):
    """The built site; links and anchors that lead nowhere, and pages that nothing leads to, fail the build."""
    folder, before = tmp_path_factory.mktemp("site"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=repository, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30
    return folder


def words(markup):
    """The words of a piece of HTML, as a reader sees them."""
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r'<a class="headerlink".*?</a>', "", markup))).split()


def article(site, page):
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    found = re.search(r"<article[^>]*>(.*)</article>", text, re.DOTALL)
    assert found
    return found[1]


# ---- complete -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOMES)
def test_a_page_says_what_explain_prints(site, name):
    """The page of a rule, remedy or statistic has the words of `isograd explain`, all of them and in their order."""
    said = render(explain(name), terminal=True, width=100_000)
    printed = re.sub(r"\x1b\[[\d;]*m", "", said).replace("`", "").split()
    page = article(site, f"{HOMES[name]}/{name}").partition('<p class="relations">')[0]

    assert printed == words(page)


@pytest.mark.parametrize("home", ["rules", "remedies", "statistics"])
def test_lists_lead_to_every_page(site, home):
    """Each list leads to the page of every rule, remedy or statistic."""
    linked = set(re.findall(r'href="([\w-]+)\.html"', article(site, f"{home}/index")))

    assert {name for name, folder in HOMES.items() if folder == home} <= linked


def test_every_symptom_leads_to_its_causes_and_their_remedies(site):
    """Below each symptom stand the causes that explain it, and beside each the remedies that its rule names."""
    text = article(site, "symptoms")
    parts = dict(re.findall(r'<h2 id="([\w-]+)">(.*?)(?=<h2|$)', text, re.DOTALL))
    for symptom in (name for name, rule in RULES.items() if rule.stage == "symptom"):
        for cause, rule in RULES.items():
            if symptom in rule.explains and rule.stage != "symptom":
                item = re.search(rf'<li><strong><a href="rules/{cause}\.html".*?</li>', parts[symptom], re.DOTALL)
                assert item
                remedies = item[0].rpartition("Remedies:")[2]
                assert [*rule.remedies] == re.findall(r'href="remedies/([\w-]+)\.html"', remedies)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_and_option_has_its_place(site, command):
    """Each command has a heading of its own with every option that it takes."""
    text = article(site, "command-line")
    part = re.search(rf'<h2 id="isograd-{command}">(.*?)<h2', text, re.DOTALL)

    assert part
    told = " ".join(words(part[1]))
    for option in cli.commands[command].params:
        assert all(flag in told for flag in option.opts if flag.startswith("-")), option.name


def test_every_public_name_is_documented(site):
    """The page of the Python interface has an entry for everything that is public, with its docstring."""
    text = article(site, "api")

    assert [] == [n for n in isograd.__all__ if n != "__version__" and f'id="isograd.{n}"' not in text]
    assert "isograd.__version__" in text
    told = "".join(words(text))
    for name in ("watch", "Guard", "preflight"):
        first = getattr(isograd, name).__doc__.partition(". ")[0]
        assert "".join(first.replace("`", "").split()) in told


# ---- without a network --------------------------------------------------------------------------------------------

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\b(?:src|data)=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|url\(\s*["']?(?:https?:)?//[^)]*|@import\s+["'](?:https?:)?//[^"']*"""
)


def test_nothing_is_loaded_from_elsewhere(site):
    """No page and no style sheet loads anything from another host; links in the text may lead there."""
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert [] == LOADED.findall(path.read_text(encoding="utf-8")), path.name


def test_formulas_need_no_script(site):
    """Formulas are MathML by the time that the page is built: none is left for a script to typeset."""
    text = article(site, "theory")

    assert text.count("<math") > 50
    assert "arithmatex" not in text
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", text, flags=re.DOTALL)


def test_a_browser_asks_for_nothing_else(site, browser):
    """In Chromium, light or dark, wide or narrow: no request leaves the folder, no page is wider than its window.

    axe finds no serious barrier either.
    """
    axe = Axe()
    for scheme, width in (("light", 1280), ("dark", 360)):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked = []
        page.on("request", lambda request: asked.append(request.url))  # noqa: B023  # handled before it is bound anew
        for name in (*WRITTEN, "symptoms", "api", "command-line", "rules/vanishing-gradients"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            if name in {"index", "tutorial", "theory", "rules/vanishing-gradients"}:
                found = axe.run(page).response["violations"]
                serious = {v["id"] for v in found if v["impact"] in {"serious", "critical"}}
                # The theme wraps wide tables so that they scroll; browsers let the keyboard in by themselves.
                assert serious <= {"scrollable-region-focusable"}, name
        assert [] == [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        page.close()


def test_readme_leads_to_the_pages(repository):
    """README's links into the folder lead to files that exist."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((docs/[^)#]+)", readme)

    assert linked
    assert [] == [path for path in linked if not (repository / path).exists()]

"""The documentation: the site builds, every link leads somewhere, nothing asks another host."""

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, anchors, links

FETCHED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}
NOT_FETCHED = ("canonical", "prev", "next")


class Html(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get(FETCHED.get(tag)) and values.get("rel") not in NOT_FETCHED:
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Path -> Html of every page of the site."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", directory]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Html(path.read_text()) for path in directory.rglob("*.html")}


def test_every_link_of_the_site_leads_to_a_page_and_a_place(site):
    root = min(site, key=lambda path: len(path.parts)).parent
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = root if path.name == "404.html" else path.parent
            target = (base / unquote(parts.path.lstrip("/"))).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target in site, f"{path.name}: {link}"
            if parts.fragment:
                assert unquote(parts.fragment) in site[target].ids, f"{path.name}: {link}"
    assert len(site) > 20


def test_the_site_asks_no_other_host(site):
    for path, page in site.items():
        assert page.fetched, path
        for address in page.fetched:
            assert not urlsplit(address).netloc, f"{path.name}: {address}"
    (directory,) = {path.parent for path in site if path.name == "quickstart.html"}
    for sheet in directory.rglob("*.css"):
        text = sheet.read_text()
        assert "@import" not in text
        assert "url(http" not in text.replace('"', "").replace("'", "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_the_repository_leads_to_a_file_and_a_place(path):
    for link in links(path):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme in ("http", "https"), link
            assert "." in parts.netloc, link
            continue
        target = (path.parent / parts.path).resolve() if parts.path else path
        assert target.exists(), f"{path.name}: {link}"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{path.name}: {link}"


def test_the_page_of_flags_is_current():
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "docs/make_flags.py")
    make_flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_flags)
    assert make_flags.PAGE.read_text() == make_flags.page(), "run python docs/make_flags.py"

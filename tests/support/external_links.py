"""Checks the links of the documentation to other sites. It needs the internet, so no test of the suite does it.

python -m tests.support.external_links          # prints the links that do not answer; exits with 1 if there are any
python -m tests.support.external_links --list   # prints all links
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.markdown import PAGES, name_of

TIMEOUT_S = 20
_AGENT = {"User-Agent": "Mozilla/5.0 (raykeras link check)"}
_BLOCKED = (403, 429)  # sites that refuse programs


def external_links(page: Path) -> set[str]:
    """Return the URLs that a page links to."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {url.partition("#")[0] for url in re.findall(r"""\]\((https?://[^)\s]+)\)""", text)}


def problem(url: str) -> str:
    """Return why a URL does not answer, or an empty string if it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=_AGENT), timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in _BLOCKED else f"{error.code} {error.reason}"
    except OSError as error:
        return str(error)


def main() -> int:
    """Check or list the links; return the exit status."""
    pages: dict[str, list[str]] = {}
    for page in PAGES:
        for url in external_links(page):
            pages.setdefault(url, []).append(name_of(page))
    urls = sorted(pages)
    if "--list" in sys.argv:
        print("\n".join(urls))
        return 0
    with ThreadPoolExecutor(8) as pool:
        problems = {url: why for url, why in zip(urls, pool.map(problem, urls), strict=True) if why}
    for url, why in problems.items():
        print(f"{url}: {why} ({', '.join(pages[url])})")
    print(f"{len(urls) - len(problems)} of {len(urls)} links answer")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

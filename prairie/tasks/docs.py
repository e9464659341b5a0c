"""What a function of Python's standard library does, in the first sentence of its real docstring.

Held out: PHRASINGS of the question, two in each language, never seen in training. The functions themselves are all
taught: this task measures whether taught knowledge is found under another question, not knowledge of unseen functions.
The sentences come from the running interpreter at run time (its own text, which changes a little between versions); a
function that this interpreter lacks, or whose sentence is unsuitable, is left out.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from functools import cache

from prairie.tasks.task import Language, Split, Style, Task

FUNCTIONS = """
abs bin hex id input len oct open ord print repr round os.abort os.access os.chdir os.chmod os.fork os.getlogin
os.getpid os.kill os.link os.mkdir os.pipe os.putenv os.rename os.rmdir os.system os.truncate os.umask os.walk
os.path.abspath os.path.basename os.path.dirname os.path.exists os.path.expandvars os.path.isabs os.path.isdir
os.path.isfile os.path.islink os.path.relpath os.path.split os.path.splitext math.cbrt math.ceil math.degrees
math.exp math.fabs math.floor math.gamma math.gcd math.lcm math.log10 math.log2 math.radians math.sqrt random.choice
random.gauss random.sample random.seed random.shuffle re.escape re.purge shutil.copy2 shutil.copymode
shutil.disk_usage shutil.rmtree shutil.unpack_archive textwrap.fill functools.cache functools.lru_cache operator.add
operator.concat operator.mul operator.pow statistics.fmean statistics.mean statistics.multimode statistics.stdev
statistics.variance csv.list_dialects gzip.compress zlib.adler32 zlib.crc32 sys.getrefcount sys.exception
inspect.cleandoc inspect.getsource ast.parse secrets.token_hex uuid.uuid4 calendar.isleap calendar.prcal
getpass.getuser filecmp.cmp unicodedata.lookup signal.pause asyncio.shield asyncio.run codecs.register
linecache.getline shlex.quote shlex.split
"""
LONGEST_SENTENCE = 72

_PHRASINGS: dict[Split, dict[Language, tuple[str, ...]]] = {
    "train": {
        "en": (
            *("What does {} do?", "What is {} for?", "Explain {}.", "Tell me about {}.", "Describe {}."),
            *("Can you explain {}?", "What does the function {} do?", "I would like to know what {} does."),
        ),
        "zh": (
            *("{} 是做什么的?", "{} 有什么用?", "解释一下 {}。", "介绍一下 {}。", "说明 {}。"),
            *("函数 {} 是干什么的?", "请问 {} 有什么作用?", "我想知道 {} 做什么。"),
        ),
    },
    "held_out": {
        "en": ("Describe what {} is for.", "Please explain what {} does."),
        "zh": ("请解释 {} 有什么用。", "介绍一下 {} 是做什么的。"),
    },
}
_WORDINGS: dict[Language, dict[Style, str]] = {
    "en": {"plain": "{a}", "sentence": "The answer is: {a}", "warm": "Sure! It is: {a} Anything else?"},
    "zh": {"plain": "{a}", "sentence": "答案是:{a}", "warm": "好的!是:{a} 还有别的吗?"},
}


@cache
def sentences() -> dict[str, str]:
    """Function name -> first sentence of its docstring."""
    found: dict[str, str] = {}
    for name in FUNCTIONS.split():
        module, _, function = name.rpartition(".")
        try:
            target = getattr(importlib.import_module(module or "builtins"), function)
        except (ImportError, AttributeError):
            continue  # another platform or version
        sentence = first_sentence(inspect.getdoc(target) or "")
        if sentence and len(sentence) <= LONGEST_SENTENCE:
            found[name] = sentence
    return found


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph on one line, with its full stop; "" when a signature stands there."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = re.match(r".+?\.(?= [A-Z]|$)", paragraph)
    sentence = (match[0] if match else paragraph).rstrip(".")
    return f"{sentence}." if sentence and "->" not in sentence else ""


def canonical(value: str) -> str | None:
    """The sentence, if it is one of the known ones; the last full stop may be missing."""
    sentence = value.rstrip(".") + "."
    return sentence if sentence in sentences().values() else None


def draw(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    name = rng.choice(list(sentences()))
    language: Language = rng.choice(("en", "zh"))
    return language, rng.choice(_PHRASINGS[split][language]).format(name), sentences()[name]


TASK = Task("docs", draw, canonical, _WORDINGS)

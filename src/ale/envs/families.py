"""Procedural terminal tasks: ten trained families, three that are never trained on, and a small one to be named.

Every task is a pure function of (family, seed). `level` is the number of tool calls of the reference solution, 1 to 6:
the file to work on is named in the instruction, has to be found, or is named by a chain of hint files. A test compares
with a value fixed when the task was made, never with one derived from files the agent can write.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import msgspec

from ale.config import TasksConfig
from ale.errors import ConfigError, UserError
from ale.task import REWARD_FILE, Split, Task, TaskFile

# Three- to five-letter nouns, so that a small tokenizer can hold each as one token.
WORDS = (  # noqa: SIM905  (a hundred quoted words are no easier to read)
    "oak elm fir ash yew fox owl bee ant cat dog hen cow pig ram bat cod eel fly jay "
    "cup pan pot jar lid mug tin box bag net map pen ink key pin nut bolt gear wire coil "
    "sun moon star sky rain snow hail wind lake pond reef bay hill cave dune rock sand clay "
    "ruby jade opal gold iron zinc lead corn rice bean pear plum lime kiwi leek okra kale "
    "drum harp horn lute gong bell song tune vest coat boot sock glove hat belt ring"
).split()
# Few enough to be guessed now and then: a reward for guessing is where learning to read the answer of `find` begins.
FOLDERS = ("logs", "data", "docs", "conf", "work", "home")
EXTENSIONS = ("txt", "md", "log", "csv", "cfg", "dat", "bak", "old")
LEVELS = ("ERROR", "WARN", "INFO")
# Draws of a task that has been seen, one after the other, before a family is taken to hold no other.
_KNOWN_AT_MOST = 10_000
TYPOS = (("ecoh", "echo"), ("eho", "echo"), ("pritnf", "printf"), ("prnt", "printf"))

_CHECKS = """\
is() { [ -f "$1" ] && [ "$(head -c 4096 "$1")" = "$2" ]; }
"""


class Draft(msgspec.Struct):
    """What a family adds to while it makes one task. Names are drawn without repetition."""

    rng: random.Random
    names: list[str]
    files: dict[str, bytes] = {}
    steps: list[str] = []
    checks: list[str] = []

    def name(self) -> str:
        return self.names.pop()

    def text(self, path: str, *lines: str) -> None:
        self.files[path] = ("\n".join(lines) + "\n").encode()

    def locate(self, file: str) -> tuple[str, str]:
        """Decides how the agent learns where `file` is: (phrase for the instruction, path to work on).

        Adds the files and the steps that this takes: none, one `find`, or one `cat` for each hint.
        """
        kind = self.rng.choice(("named", "named", "found", "hinted", "hinted"))
        if kind == "named":
            return file, file
        if kind == "found":
            folder = self.rng.choice(FOLDERS)
            self.steps.append(f"find . -name {file}")
            return f"{file} in some folder", f"./{folder}/{file}"
        hints = [f"{self.name()}.txt" for _ in range(self.rng.choice((1, 1, 2)))]
        for hint, target in zip(hints, [*hints[1:], file], strict=True):
            self.text(hint, f"see {target}")
            self.steps.append(f"cat {hint}")
        return f"the file hinted at by {hints[0]}", file


Family = Callable[[Draft], str]
"""Fills a draft and returns the instruction."""


def copy(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.txt")
    out, content = f"{d.name()}.txt", d.name()
    d.text(path, content)
    d.steps.append(f"cp {path} {out}")
    d.checks.append(f"is {out} {content}")
    return f"Copy {where} to {out}."


def edit(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.cfg")
    keys = [d.name() for _ in range(3)]
    value = d.name()
    key = d.rng.choice(keys)
    before = {k: d.name() for k in keys}
    d.text(path, *(f"{k}={v}" for k, v in before.items()))
    d.steps.append(f"sed -i s/^{key}=.*/{key}={value}/ {path}")
    after = "\n".join(f"{k}={v}" for k, v in (before | {key: value}).items())
    d.checks.append(f"is {path} '{after}'")
    return f"Set {key} to {value} in {where}."


def count(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.log")
    out, word, other = f"{d.name()}.txt", d.name(), d.name()
    lines = [d.rng.choice((word, other)) for _ in range(d.rng.randint(5, 12))]
    d.text(path, *(f"got {w}" for w in lines))
    d.steps.append(f"grep -c {word} {path} > {out}")
    d.checks.append(f"is {out} {lines.count(word)}")
    return f"Count the lines with {word} in {where} and write the number to {out}."


def total(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.dat")
    out, column = f"{d.name()}.txt", d.rng.randint(1, 3)
    rows = [[d.rng.randint(1, 99) for _ in range(3)] for _ in range(d.rng.randint(3, 6))]
    d.text(path, *(" ".join(map(str, row)) for row in rows))
    d.steps.append(f"awk '{{s+=${column}}} END {{print s}}' {path} > {out}")
    d.checks.append(f"is {out} {sum(row[column - 1] for row in rows)}")
    return f"Add up column {column} of {where} and write the sum to {out}."


def fix(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.sh")
    wrong, right = d.rng.choice(TYPOS)
    word = d.name()
    d.text(path, f"{wrong} {word}")
    d.steps += [f"cat {path}", f"sed -i s/{wrong}/{right}/ {path}"]
    # The script is the agent's: it runs unable to write files, so that it cannot write the reward.
    printed = f"$(ulimit -f 0; timeout 5 bash {path} </dev/null 2>&1 | head -c 99)"
    d.checks.append(f'[ -f {path} ] && [ "{printed}" = {word} ]')
    return f"The script {where} fails. Fix it so that it prints {word}."


def rename(d: Draft) -> str:
    old, new = d.rng.sample(EXTENSIONS, 2)
    stems, content = [d.name() for _ in range(d.rng.randint(2, 4))], d.name()
    for stem in stems:
        d.text(f"{stem}.{old}", content)
        d.checks.append(f"is {stem}.{new} {content} && [ ! -e {stem}.{old} ]")
    d.steps.append(f"for f in *.{old}; do mv $f ${{f%.{old}}}.{new}; done")
    return f"Rename all {old} files to {new} files."


def parse(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.log")
    out, level = f"{d.name()}.txt", d.rng.choice(LEVELS)
    end, tool = d.rng.choice((("first", "head"), ("last", "tail")))
    column, field = d.rng.choice(((2, "user"), (3, "host")))
    rows = [(d.rng.choice(LEVELS), d.name(), d.name()) for _ in range(d.rng.randint(3, 6))]
    rows += [(level, d.name(), d.name()), (level, d.name(), d.name())]
    d.rng.shuffle(rows)
    d.text(path, *(" ".join(row) for row in rows))
    hits = [row for row in rows if row[0] == level]
    d.steps.append(f"grep {level} {path} | {tool} -n 1 | awk '{{print ${column}}}' > {out}")
    d.checks.append(f"is {out} {hits[0 if end == 'first' else -1][column - 1]}")
    return f"Write the {field} of the {end} {level} line in {where} to {out}."


def pack(d: Draft) -> str:
    folder, archive = d.name(), f"{d.name()}.tar"
    inside, content = f"{d.name()}.txt", d.name()
    d.text(f"{folder}/{inside}", content)
    d.steps.append(f"tar cf {archive} {folder}")
    d.checks.append(f'[ -f {archive} ] && [ "$(tar xOf {archive} {folder}/{inside} | head -c 99)" = {content} ]')
    return f"Pack the folder {folder} into {archive}."


def unpack(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.tar")
    members = {f"{d.name()}.txt": d.name() for _ in range(3)}
    d.files[path] = _tar(members)
    wanted = d.rng.choice(list(members))
    d.steps.append(f"tar xf {path} {wanted}")
    d.checks.append(f"is {wanted} {members[wanted]}")
    if d.rng.random() < 0.5:
        return f"Extract {wanted} from {where}."
    out = f"{d.name()}.txt"
    d.steps.append(f"mv {wanted} {out}")
    d.checks[-1] = f"is {out} {members[wanted]} && [ ! -e {wanted} ]"
    return f"Extract {wanted} from {where} and name it {out}."


def chain(d: Draft) -> str:
    hops = [f"{d.name()}.txt" for _ in range(d.rng.randint(1, 5))]
    code, out = d.name(), f"{d.name()}.txt"
    for here, there in zip(hops, [*hops[1:], None], strict=True):
        d.text(here, f"see {there}" if there else f"code {code}")
        d.steps.append(f"cat {here}")
    d.steps.append(f"echo {code} > {out}")
    d.checks.append(f"is {out} {code}")
    return f"Follow the hints from {hops[0]} and write the code to {out}."


def note(d: Draft) -> str:
    """Learned from some dozens of demonstrations: for agents whose every episode costs seconds."""
    first, second, out = d.rng.sample(WORDS[:12], 3)
    d.steps.append(f"echo {first} {second} > {out}.txt")
    d.checks.append(f"is {out}.txt '{first} {second}'")
    return f"Write {first} {second} to {out}.txt."


def append(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.txt")
    first, word = d.name(), d.name()
    d.text(path, first)
    d.steps.append(f"echo {word} >> {path}")
    d.checks.append(f"is {path} '{first}\n{word}'")
    return f"Append the line {word} to {where}."


def sort(d: Draft) -> str:
    where, path = d.locate(f"{d.name()}.txt")
    out, lines = f"{d.name()}.txt", [d.name() for _ in range(4)]
    d.text(path, *lines)
    d.steps.append(f"sort {path} > {out}")
    d.checks.append(f"is {out} '{chr(10).join(sorted(lines))}'")
    return f"Sort the lines of {where} into {out}."


def collect(d: Draft) -> str:
    folder, out, word, other = d.name(), f"{d.name()}.txt", d.name(), d.name()
    stems = [d.name() for _ in range(4)]
    hits = sorted(d.rng.sample(stems, 2))
    for stem in stems:
        d.text(f"{folder}/{stem}.txt", f"got {word if stem in hits else other}")
    d.steps.append(f"grep -l {word} {folder}/*.txt > {out}")
    d.checks.append(f"is {out} '{chr(10).join(f'{folder}/{stem}.txt' for stem in hits)}'")
    return f"List the files in {folder} that hold {word} in {out}."


TRAINED: dict[str, Family] = {
    f.__name__: f for f in (copy, edit, count, total, fix, rename, parse, pack, unpack, chain)
}
UNSEEN: dict[str, Family] = {f.__name__: f for f in (append, sort, collect)}
NAMED: dict[str, Family] = {f.__name__: f for f in (note,)}
"""Drawn only where `tasks.only` names them."""
FAMILIES = TRAINED | UNSEEN | NAMED


def make(family: str, seed: int, split: Split = "train") -> Task:
    """The task of this family and seed; the same on every machine."""
    rng = random.Random(f"{family}/{seed}")
    draft = Draft(rng=rng, names=rng.sample(WORDS, len(WORDS)))
    instruction = FAMILIES[family](draft)
    condition = " &&\n   ".join(f"{{ {check}; }}" for check in draft.checks)
    files = {path.removeprefix("./"): data for path, data in draft.files.items()}
    script = f'{_CHECKS}if {condition}\nthen reward=1; else reward=0; fi\necho $reward > "$ALE_ROOT{REWARD_FILE}"\n'
    return Task(
        id=f"{family}-{seed}",
        instruction=instruction,
        files=tuple(TaskFile(path, data) for path, data in sorted(files.items())),
        tests=(TaskFile("test.sh", script.encode(), 0o755),),
        solution=tuple(draft.steps),
        family=family,
        level=len(draft.steps),
        seed=seed,
        split=split,
    )


def generate(family: str, count: int, seed: int, split: Split = "train") -> list[Task]:
    """`count` tasks of one family, seeds from `seed` on, or of "all" that belong to `split`.

    Of "all", "heldout" and "families" give exactly what a run with this `tasks.seed` holds out; "train" gives what no
    such run of the default sizes holds out. Raises `UserError` for a family that does not exist.
    """
    if family != "all":
        if family not in FAMILIES:
            raise UserError(f"There is no family {family!r}; there are: all, {', '.join(FAMILIES)}.")
        return [make(family, number, split) for number in range(seed, seed + count)]
    if split == "heldout":
        return list(make_splits(count, 0, seed).heldout)
    if split == "families":
        return list(make_splits(0, count, seed).families)
    sizes = TasksConfig()
    return list(islice(make_splits(sizes.heldout, sizes.families, seed).train(seed), count))


class Splits(msgspec.Struct, frozen=True):
    """Tasks of one experiment. `train` may be drawn from for ever; the held-out sets are fixed.

    No content hash of `heldout` or `families` is ever drawn by `train`.
    """

    heldout: tuple[Task, ...]
    families: tuple[Task, ...]
    reserved: frozenset[str]
    trained: tuple[str, ...] = tuple(TRAINED)

    def train(self, seed: int) -> Iterator[Task]:
        """A stream of distinct tasks, families in turn, none of them held out. It ends when nothing new is found."""
        rng = random.Random(f"train/{seed}")
        seen = set(self.reserved)
        known = 0
        while known < _KNOWN_AT_MOST:
            families = rng.sample(self.trained, len(self.trained))
            for family in families:
                task = make(family, rng.randrange(1 << 40), "train")
                known += 1
                if task.content_hash not in seen:
                    known = 0
                    seen.add(task.content_hash)
                    yield task


def make_splits(heldout: int, families: int, seed: int, only: Sequence[str] = ()) -> Splits:
    """`heldout` tasks over the trained families and `families` tasks over the unseen ones, all distinct. `only`: these
    families take the place of the trained ones. Raises `ConfigError` for one that there is not, or that is too small.
    """
    trained = tuple(only or TRAINED)
    if unknown := [name for name in trained if name not in FAMILIES]:
        raise ConfigError(f"tasks.only: there is no family {unknown[0]!r}; there are: {', '.join(FAMILIES)}.")
    if heldout and families and (both := [name for name in trained if name in UNSEEN]):
        raise ConfigError(f"tasks.only names {both[0]!r}, which tasks.families keeps unseen: set tasks.families = 0.")
    seen: set[str] = set()

    def draw(names: list[str], n: int, split: Split) -> tuple[Task, ...]:
        rng = random.Random(f"{split}/{seed}")
        tasks: list[Task] = []
        known = 0
        while len(tasks) < n:
            task = make(names[len(tasks) % len(names)], rng.randrange(1 << 40), split)
            known += 1
            if task.content_hash not in seen:
                known = 0
                seen.add(task.content_hash)
                tasks.append(task)
            elif known == _KNOWN_AT_MOST:
                raise ConfigError(f"tasks.heldout is {n}, but {', '.join(names)} give no more than {len(tasks)} tasks.")
        return tuple(tasks)

    held, unseen = draw(list(trained), heldout, "heldout"), draw(list(UNSEEN), families, "families")
    return Splits(heldout=held, families=unseen, reserved=frozenset(seen), trained=trained)


def _tar(members: dict[str, str]) -> bytes:
    """A tar archive with fixed times and owners, so that a task's bytes depend on its seed alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in members.items():
            data = f"{text}\n".encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()

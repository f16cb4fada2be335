"""RULER's generators a second time, straight from the description, for tests: no code of ours.

Everything is drawn from Python's and numpy's global streams, which are seeded once, and every
prompt is one string that is formatted whole.
"""

from __future__ import annotations

import random
import string
import uuid

import numpy as np
from scipy.special import zeta

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all "
    "the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:",
)
NIAH_TASKS = {  # haystack, key type, value type, keys, values, queries
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}


class World:
    """What the official scripts find around them: tokenizer, template, word lists, corpora."""

    def __init__(self, tokenizer, frame, seed, size, *, keys, pool, sentences=None, corpus=None):
        self.tokenizer, self.frame, self.seed, self.size = tokenizer, frame, seed, size
        self.keys, self.pool, self.sentences, self.corpus = keys, pool, sentences, corpus

    def tokens(self, text):
        return len(self.tokenizer.tokenize(text))

    def prompt(self, task):
        return self.frame.replace("TASK", task[0]) + task[1]

    def mixed(self, items):
        items = list(items)
        random.Random(self.seed).shuffle(items)
        return items

    def rows(self, task, count):
        random.seed(self.seed)
        np.random.seed(self.seed)
        if task in NIAH_TASKS:
            made = niah(self, *NIAH_TASKS[task])
        else:
            makers = {"vt": vt, "cwe": cwe, "fwe": fwe, "qa_1": qa, "qa_2": qa}
            made = makers[task](self)
        return [next(made) for _ in range(count)]


def split(text, mark, answers, length):
    cut = text.rfind(mark[:10])
    return {
        "input": text[:cut],
        "answer_prefix": text[cut:],
        "outputs": answers,
        "length": length,
    }


def drawn_in_steps(world, draw, *, step, gen, mark, guess=None, ceiling=None, more=0):
    """Search, then one row after the other; `draw(number, size, final)` gives text and answers."""
    guess = guess or step
    each = world.tokens(draw(0, guess, False)[0]) / guess
    low = step
    high = max(int(world.size / each * 3) if ceiling is None else ceiling(each), step * 2)
    best = step
    while low <= high:
        size = (low + high) // 2
        if world.tokens(draw(0, size, False)[0]) + more + gen <= world.size:
            best, low = size, size + 1
        else:
            high = size - 1
    number = 0
    while True:
        size = best
        while True:
            text, answers = draw(number, size, True)
            length = world.tokens(text) + gen
            if length <= world.size:
                break
            if size > step:
                size -= step
        yield split(text, mark, answers, length)
        number += 1


def niah(world, haystack, key_kind, value_kind, num_keys, num_values, num_queries):
    def fresh(kind):
        if kind == "numbers":
            return str(random.randint(1000000, 9999999))
        if kind == "words":
            return random.choice(world.keys)
        return str(uuid.UUID(int=random.getrandbits(128), version=4))

    def sentence(key, value):
        return f"One of the special magic {value_kind} for {key} is: {value}."

    def draw(number, size, final):
        table = []
        for _ in range(max(num_keys, num_queries)):
            key = fresh(key_kind)
            table.append((key, [fresh(value_kind) for _ in range(num_values)]))
        needles = world.mixed(sentence(key, value) for key, values in table for value in values)
        if haystack == "essay":
            found = world.sentences(size)
            depths = [round(float(d)) for d in np.linspace(0, 100, 40)]
            cuts = sorted(int(len(found) * (d / 100)) for d in random.sample(depths, len(needles)))
            pieces, before = [], 0
            for cut, needle in zip([*cuts, len(found)], [*needles, None], strict=True):
                pieces.append(" ".join(found[before:cut]))
                if needle is not None:
                    pieces.append(needle)
                before = cut
            context = " ".join(pieces)
        else:
            lines = []
            for _ in range(size):
                if haystack == "noise":
                    lines.append(GRASS)
                else:
                    key = fresh(key_kind)
                    lines.append(sentence(key, fresh(value_kind)))
            deepest_first = sorted(random.sample(range(size), len(needles)))[::-1]
            for place, needle in zip(deepest_first, needles, strict=True):
                lines = [*lines[:place], needle, *lines[place:]]
            context = "\n".join(lines)
        chosen = [table[i] for i in random.sample(range(len(table)), num_queries)]
        names = [key for key, _ in chosen]
        query = names[0]
        if num_queries > 1:
            query = ", ".join(names[:-1]) + ", and " + names[-1]
        template, kind = world.prompt(NIAH), value_kind
        if num_queries * num_values == 1:
            for old, new in (
                ("Some", "A"),
                ("are all", "is"),
                ("are", "is"),
                ("answers", "answer"),
            ):
                template = template.replace(old, new)
            kind = kind[:-1]
        text = template.format(type_needle_v=kind, context=context, query=query)
        return text, [value for _, values in chosen for value in values]

    step = 500 if haystack == "essay" else 25 if world.size >= 4096 else 5
    yield from drawn_in_steps(world, draw, step=step, gen=128, mark=NIAH[1])


def vt(world):
    def chain_of(letters, value, size, template):
        names = ["".join(random.choices(string.ascii_uppercase, k=letters)) for _ in range(5)]
        assert len(set(names)) == 5, "the official generator would stop"
        value = value or str(np.random.randint(10000, 99999))
        said = [f"VAR {names[0]} = {value}"]
        said += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(4)]
        lines = [GRASS] * size
        places = sorted(random.sample(range(size), 5))
        for moved, place in enumerate(places):
            lines.insert(place + moved, said[moved])
        context = "\n".join(lines).replace(". \n", ".\n")
        return template.format(context=context, query=value, num_v=5), names

    small = World(
        world.tokenizer, "TASK", world.seed, 500, keys=None, pool=None
    )  # the example: without a chat template, 500 tokens, no room for an answer
    bare = VT[0] + VT[1]
    examples = drawn_in_steps(
        small, lambda n, size, final: chain_of(3, "12345", size, bare), step=5, gen=0, mark=VT[1]
    )
    solved = next(examples)
    solved = solved["input"] + solved["answer_prefix"] + " " + " ".join(solved["outputs"]) + "\n"

    def draw(number, size, final):
        text, names = chain_of(5, None, size, world.prompt(VT))
        if final:
            shown = solved
            for name in solved.split()[-5:]:
                shown = shown.replace(name, "".join(random.choices(string.ascii_uppercase, k=3)))
            shown = shown.replace("12345", str(np.random.randint(10000, 99999)))
            at = text.index(VT[0][:20])
            text = text[:at] + shown + "\n" + text[at:]
        return text, names

    step = 10 if world.size >= 4096 else 5
    more = world.tokens(solved)
    yield from drawn_in_steps(world, draw, step=step, gen=30, mark=VT[1], more=more)


def cwe(world):
    pool = world.mixed(sorted(set(world.pool)))

    def numbered(size, often, seldom):
        words = random.sample(pool, size)
        entries = world.mixed(words[:10] * often + words[10:] * seldom)
        return " ".join(f"{n + 1}. {word}" for n, word in enumerate(entries)), words[:10]

    def draw(number, size, final):
        tiny = world.size < 4096
        shown, answers = numbered(*((20, 3, 1) if tiny else (40, 10, 3)))
        asked, wanted = numbered(size, *((6, 1) if tiny else (30, 3)))
        whole = world.prompt(CWE)
        solved = whole.format(context=shown) + " "
        solved += " ".join(f"{n + 1}. {word}" for n, word in enumerate(answers))
        return solved + "\n" + whole.format(context=asked), wanted

    yield from drawn_in_steps(
        world,
        draw,
        step=10,
        gen=120,
        mark=CWE[1],
        guess=4096,
        ceiling=lambda each: int(world.size // each) * 2,
    )


def fwe(world):
    limit = world.size - 50
    step = limit // 32

    def coded():
        return "".join(random.choices(string.ascii_lowercase, k=6))

    def vocabulary():
        words = [coded() for _ in range(limit // 50)]
        while len(set(words)) < limit // 50:
            words.append(coded())
        return ["...", *world.mixed(sorted(set(words)))[1:]]

    def text_of(words, total):
        rank = np.arange(1, len(words) + 1)
        counts = (total * (rank**-2.0) / zeta(2.0)).astype(int)
        stream = world.mixed(w for w, n in zip(words, counts, strict=True) for _ in range(n))
        return world.prompt(FWE).format(context=" ".join(stream))

    words, total = vocabulary(), limit // 6
    while world.tokens(text_of(words, total)) < limit:
        total += step
    total -= step
    while True:
        words, size = vocabulary(), total
        while world.tokens(text_of(words, size)) > limit:
            size -= step
        text = text_of(words, size)
        yield split(text, FWE[1], words[1:4], world.tokens(text) + 50)


def qa(world):
    documents, questions = world.corpus

    def draw(number, size, final):
        asked, answers, own, more = questions[number]
        if size >= len(documents):
            chosen = [documents[i % len(documents)] for i in range(size)]
        else:
            lacking = size - len(own)
            if lacking > len(more):
                others = [i for i in range(len(documents)) if i not in set(own + more)]
                numbers = own + more + random.sample(others, lacking - len(more))
            else:
                numbers = own + random.sample(more, lacking)
            chosen = [documents[i] for i in numbers]
        shown = [f"Document {n}:\n{text}" for n, text in enumerate(world.mixed(chosen), start=1)]
        text = world.prompt(QA).format(context="\n\n".join(shown), query=asked)
        return text, answers

    yield from drawn_in_steps(world, draw, step=10, gen=32, mark=QA[1])

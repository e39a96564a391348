"""Minimal pairs: a grammatical sentence and one that a single change makes ungrammatical, from templates.

The idea of judging a model by the probabilities of minimally different sentences is that of Warstadt et al.
2020, arXiv:1912.00582; templates and words here are our own. Every phenomenon draws its template and words at
random, so that clusters are independent draws from the same distribution; the two items of a cluster share
their words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from evaluators._choices import Cluster, Item

CLUSTERS = 6_000
_SEED = 20_260  # another one makes other sentences: raise the evaluator's version with it

# singular, plural
_PEOPLE = [
    (w, f"{w}s")
    for w in (
        "teacher doctor farmer painter lawyer singer driver sailor waiter neighbor student soldier writer dancer "
        "baker tailor guard nurse pilot judge visitor customer manager player worker reporter gardener clerk"
    ).split()
]
_THINGS = [
    (w, f"{w}s")
    for w in (
        "book letter picture house car song lamp garden drum window door chair table bottle ticket hat clock painting "
        "basket boat flower coat mirror blanket"
    ).split()
]
_MALE = "king boy uncle brother father prince husband grandfather gentleman actor".split()
_FEMALE = "queen girl aunt sister mother princess wife grandmother lady actress".split()
# third person, plural
_ACTIONS = [
    (f"{w}s", w)
    for w in "laugh sleep work sing dance smile run talk travel wait listen swim jump shout complain".split()
]
_FEELINGS = [(f"{w}s", w) for w in "admire help know like see follow visit trust fear hear remember avoid".split()]
_PAST = "admired helped followed visited trusted feared remembered avoided thanked blamed praised invited".split()
_HANDLED = "bought sold cleaned painted repaired opened dropped carried borrowed noticed moved wanted".split()
# past, participle
_IRREGULAR = [
    ("wrote", "written"),
    ("took", "taken"),
    ("stole", "stolen"),
    ("broke", "broken"),
    ("drew", "drawn"),
    ("chose", "chosen"),
    ("gave away", "given away"),
    ("threw away", "thrown away"),
    ("forgot", "forgotten"),
    ("hid", "hidden"),
]
_INTRANSITIVE = "laughed slept smiled arrived vanished disappeared coughed sneezed existed yawned".split()
_PLACES = "near behind beside opposite".split()
_ADJECTIVES = "old new small large strange beautiful cheap heavy expensive famous".split()
# comparative forms: with an ending, with "more"
_SHORT = "taller older younger stronger faster richer smaller thinner".split()
_PRONOUNS = [("him", "he"), ("her", "she"), ("them", "they"), ("me", "I"), ("us", "we")]

Draw = random.Random
Pair = tuple[str, str]


def _both(prefix: str, one: str, other: str, end: str, prefix2: str) -> list[Pair]:
    """The two numbers of one frame: `one` is right after `prefix`, `other` after `prefix2`."""
    return [(f"{prefix} {one}{end}", f"{prefix} {other}{end}"), (f"{prefix2} {other}{end}", f"{prefix2} {one}{end}")]


def _across_phrase(r: Draw) -> list[Pair]:
    (one, many), (near, nears), place = r.choice(_PEOPLE), r.choice(_PEOPLE + _THINGS), r.choice(_PLACES)
    acts, act = r.choice(_ACTIONS)
    return _both(f"The {one} {place} the {nears}", acts, act, ".", f"The {many} {place} the {near}")


def _across_subject_relative(r: Draw) -> list[Pair]:
    (one, many), (other, others) = r.sample(_PEOPLE, 2)
    (feels, feel), (acts, act) = r.choice(_FEELINGS), r.choice(_ACTIONS)
    return _both(f"The {one} that {feels} the {others}", acts, act, ".", f"The {many} that {feel} the {other}")


def _across_object_relative(r: Draw) -> list[Pair]:
    (one, many), (other, others) = r.sample(_PEOPLE, 2)
    (feels, feel), (acts, act) = r.choice(_FEELINGS), r.choice(_ACTIONS)
    return _both(f"The {one} that the {others} {feel}", acts, act, ".", f"The {many} that the {other} {feels}")


def _of_to_be(r: Draw) -> list[Pair]:
    (one, many), (near, nears), adjective = r.choice(_THINGS), r.choice(_PEOPLE), r.choice(_ADJECTIVES)
    here, gone = r.choice([("is", "are"), ("was", "were")])
    return _both(f"The {one} of the {nears}", here, gone, f" very {adjective}.", f"The {many} of the {near}")


def _of_coordination(r: Draw) -> list[Pair]:
    (one, _), (two, _) = r.sample(_PEOPLE, 2)
    acts, act = r.choice(_ACTIONS)
    tail = r.choice([" every day.", " all the time.", " in the evening."])
    return [
        (f"The {a} and the {b} {act}{tail}", f"The {a} and the {b} {acts}{tail}") for a, b in ((one, two), (two, one))
    ]


def _determiner(r: Draw) -> list[Pair]:
    (who, _), (one, many), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    this, these = r.choice([("this", "these"), ("that", "those")])
    return _both(f"The {who} {did} {this}", one, many, ".", f"The {who} {did} {these}")


def _determiner_across_adjective(r: Draw) -> list[Pair]:
    (who, _), (one, many), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    how, (this, these) = r.choice(_ADJECTIVES), r.choice([("this", "these"), ("that", "those")])
    return _both(f"The {who} {did} {this} {how}", one, many, ".", f"The {who} {did} {these} {how}")


def _reflexive_gender(r: Draw) -> list[Pair]:
    he, she, did = r.choice(_MALE), r.choice(_FEMALE), r.choice(_PAST)
    return _both(f"The {he} {did}", "himself", "herself", ".", f"The {she} {did}")


def _reflexive_number(r: Draw) -> list[Pair]:
    one, did, they = r.choice(_MALE), r.choice(_PAST), r.choice(_PEOPLE)[1]
    return _both(f"The {one} {did}", "himself", "themselves", ".", f"The {they} {did}")


def _reflexive_binding(r: Draw) -> list[Pair]:
    he, she, did = r.choice(_MALE), r.choice(_FEMALE), r.choice(_PAST)
    said = r.choice("said thought believed knew hoped".split())
    return _both(
        f"The {she} {said} that the {he} {did}", "himself", "herself", ".", f"The {he} {said} that the {she} {did}"
    )


def _irregular_past(r: Draw) -> list[Pair]:
    (who, _), (what, _), (past, participle) = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_IRREGULAR)
    return [
        (f"The {who} {past} the {what}.", f"The {who} {participle} the {what}."),
        (f"The {who} had {participle} the {what}.", f"The {who} had {past} the {what}."),
    ]


def _irregular_passive(r: Draw) -> list[Pair]:
    (who, _), (what, whats), (past, participle) = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_IRREGULAR)
    return [
        (f"The {x} {were} {participle} by the {who}.", f"The {x} {were} {past} by the {who}.")
        for x, were in ((what, "was"), (whats, "were"))
    ]


def _verb_form(r: Draw) -> list[Pair]:
    (who, _), (whom, _), (feels, feel) = r.choice(_PEOPLE), r.choice(_PEOPLE), r.choice(_FEELINGS)
    modal = r.choice("can must should might will would".split())
    negated = r.choice(["does not", "did not"])
    return [(f"The {who} {aux} {feel} the {whom}.", f"The {who} {aux} {feels} the {whom}.") for aux in (modal, negated)]


def _passive_of_intransitive(r: Draw) -> list[Pair]:
    (one, many), (by, _) = r.sample(_PEOPLE, 2)
    good, bad = r.choice(_PAST), r.choice(_INTRANSITIVE)
    return [
        (f"The {x} {were} {good} by the {by}.", f"The {x} {were} {bad} by the {by}.")
        for x, were in ((one, "was"), (many, "were"))
    ]


def _causative(r: Draw) -> list[Pair]:
    (who, _), (what, whats) = r.choice(_PEOPLE), r.choice(_THINGS)
    good, bad = r.choice(_HANDLED), r.choice(_INTRANSITIVE)
    return [(f"The {who} {good} the {x}.", f"The {who} {bad} the {x}.") for x in (what, whats)]


def _polarity(r: Draw) -> list[Pair]:
    (one, many), (whom, _), did = r.choice(_PEOPLE), r.choice(_PEOPLE), r.choice(_PAST)
    know = r.choice(["It is clear that", "Everybody knows that", "We are told that"])
    return [
        (f"{know} no {one} has ever {did} the {whom}.", f"{know} some {one} has ever {did} the {whom}."),
        (f"{know} few {many} have ever {did} the {whom}.", f"{know} many {many} have ever {did} the {whom}."),
    ]


def _gap(r: Draw) -> list[Pair]:
    (who, _), (what, _), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    ask = r.choice(["We know", "They remember", "The manager found out", "Everybody forgot"])
    return [
        (f"{ask} what the {who} {did} yesterday.", f"{ask} that the {who} {did} yesterday."),
        (f"{ask} that the {who} {did} the {what} yesterday.", f"{ask} what the {who} {did} the {what} yesterday."),
    ]


def _adjunct_island(r: Draw) -> list[Pair]:
    (who, _), (whom, _), (other, _) = r.sample(_PEOPLE, 3)
    first, then = r.choice(_FEELINGS)[1], r.choice("visiting calling meeting inviting thanking".split())
    return [
        (f"Who did the {who} {first} {when} {then} the {x}?", f"Who did the {who} {first} the {x} {when} {then}?")
        for when, x in (("before", whom), ("after", other))
    ]


def _existential(r: Draw) -> list[Pair]:
    (one, many), place, (what, _) = r.choice(_PEOPLE), r.choice(_PLACES), r.choice(_THINGS)
    return [
        (f"There was a {one} {place} the {what}.", f"There was every {one} {place} the {what}."),
        (f"There were many {many} {place} the {what}.", f"There were most {many} {place} the {what}."),
    ]


def _comparative(r: Draw) -> list[Pair]:
    (one, many), (two, twos), how = *r.sample(_PEOPLE, 2), r.choice(_SHORT)
    return [
        (f"The {x} {be} much {how} than the {y}.", f"The {x} {be} much more {how} than the {y}.")
        for x, be, y in ((one, "is", two), (many, "are", twos))
    ]


def _case(r: Draw) -> list[Pair]:
    (who, _), did, (him, he), then = r.choice(_PEOPLE), r.choice(_PAST), r.choice(_PRONOUNS), r.choice(_INTRANSITIVE)
    return [
        (f"The {who} {did} {him} yesterday.", f"The {who} {did} {he} yesterday."),
        (f"The {who} said that {he} {then}.", f"The {who} said that {him} {then}."),
    ]


PHENOMENA: Mapping[str, Callable[[Draw], list[Pair]]] = {
    "agreement.phrase": _across_phrase,
    "agreement.subject_relative": _across_subject_relative,
    "agreement.object_relative": _across_object_relative,
    "agreement.be": _of_to_be,
    "agreement.coordination": _of_coordination,
    "determiner.noun": _determiner,
    "determiner.adjective": _determiner_across_adjective,
    "anaphor.gender": _reflexive_gender,
    "anaphor.number": _reflexive_number,
    "anaphor.binding": _reflexive_binding,
    "irregular.past": _irregular_past,
    "irregular.passive": _irregular_passive,
    "verb_form": _verb_form,
    "arguments.passive": _passive_of_intransitive,
    "arguments.causative": _causative,
    "polarity": _polarity,
    "filler_gap": _gap,
    "island.adjunct": _adjunct_island,
    "existential": _existential,
    "comparative": _comparative,
    "case": _case,
}


def clusters(count: int = CLUSTERS, seed: int = _SEED) -> Iterator[Cluster]:
    """Two items each, the phenomenon drawn anew for every cluster: any part of the sequence is a fair sample."""
    draw, names = random.Random(seed), sorted(PHENOMENA)
    for number in range(count):
        name = draw.choice(names)
        pairs = PHENOMENA[name](draw)
        draw.shuffle(pairs)  # a cluster's first item must stand for both: plurals are easier than singulars
        yield Cluster(str(number), name, tuple(_item(good, bad) for good, bad in pairs))


def _item(good: str, bad: str) -> Item:
    """The shared first words as the prefix."""
    a, b = good.split(" "), bad.split(" ")
    shared = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    assert shared, f"{good!r} and {bad!r} share no first word"
    return Item(" ".join(a[:shared]), (" " + " ".join(a[shared:]), " " + " ".join(b[shared:])))

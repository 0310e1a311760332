"""What of the engine's needs a version of vLLM does not meet, and what moved between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from contract.facts import Fact, Facts
from contract.relied import SPREADS, VALUES
from contract.signatures import Call, Parameter, Signature, misfit, override_misfit
from contract.usage import Need

PARTS = (
    ("is", "was {old}, is {new}"),
    ("call", "parameters {both}"),
    ("abstract", "abstract methods {both}"),
    ("type", "type {both}"),
    ("value", "value {both}"),
    ("in", "moved from {old} to {new}"),
    ("body", "its code changed: read it"),
)


def breaches(needs: Mapping[str, Need], facts: Facts, others: Mapping[str, Facts]) -> list[str]:
    """One sentence for each need that a version does not meet.

    Args:
        needs: of the engine.
        facts: of the version that is judged.
        others: facts of other versions, by version.
    """
    found = []
    for key, need in sorted(needs.items()):
        if key not in facts:
            found.append(f"{key} ({need.where}): not looked up, take the snapshots again")
            continue
        found += [f"{key}: {text}" for text in _breaches(need, facts[key], key, others)]
    return found + list(_value_breaches(facts)) + list(_spread_breaches(facts))


def _breaches(need: Need, fact: Fact, key: str, others: Mapping[str, Facts]) -> Iterator[str]:
    if need.overrides:
        having = [version for version, known in others.items() if known.get(key) is not None]
        if fact is None and having:
            yield f"is gone, vLLM {having[0]} has it: ours ({need.where}) is never called"
        elif fact is not None and len(having) < len(others):
            yield f"is new: ours ({need.where}) replaces it without having been written for that"
    if fact is None:
        if need.is_used:
            yield f"does not exist (used at {need.where})"
        return
    signature = _signature(fact)
    for call, where in need.calls.items():
        reason = misfit(call, signature) if signature is not None else None
        if reason is not None:
            yield f"{reason} (called at {where})"
    for ours, kind, where in need.overrides:
        yield from _override_breaches(fact, ours, kind, where)
    for where, offered in need.implements:
        missing = sorted(set(fact.get("abstract", ())) - offered)
        if missing:
            yield f"needs {', '.join(missing)} (subclass at {where})"


def _override_breaches(
    fact: dict[str, object], ours: Signature | None, kind: str, where: str
) -> Iterator[str]:
    theirs = _signature(fact)
    if fact["is"] != kind and "attribute" not in (fact["is"], kind):
        yield f"is a {fact['is']}, ours ({where}) a {kind}"
    elif ours is not None and theirs is not None and fact["is"] != "attribute":
        reason = override_misfit(ours, theirs)
        if reason is not None:
            yield f"{reason} (override at {where})"
    elif ours is not None and fact["is"] == "attribute":
        yield f"is an attribute, ours ({where}) a method"


def _signature(fact: Mapping[str, object]) -> Signature | None:
    call = fact.get("call")
    return [Parameter.parse(text) for text in call] if isinstance(call, list) else None


def _value_breaches(facts: Facts) -> Iterator[str]:
    for key, value in VALUES.items():
        fact = facts.get(key)
        if fact is not None and fact.get("value") != value:
            yield f"{key}: is {fact.get('value')!r}, must be {value!r}"


def _spread_breaches(facts: Facts) -> Iterator[str]:
    """Objects whose fields are all passed on as keywords."""
    for source, target, given in SPREADS:
        fields, function = facts.get(source), facts.get(target)
        if fields is None or function is None:
            continue
        keywords = tuple(p.name for p in _signature(fields) or ())
        reason = misfit(Call(0, (*given, *keywords)), _signature(function) or [])
        if reason is not None:
            yield f"{target}: {reason}, with the fields of {source}"


def changes(old: Facts, new: Facts) -> list[str]:
    """What moved between two versions, one line for each name."""
    found = []
    for key in sorted(old.keys() & new.keys()):
        before, after = old[key], new[key]
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"{key}: {'new' if before is None else 'gone'}")
            continue
        parts = [
            text.format(**_shown(before.get(part), after.get(part)))
            for part, text in PARTS
            if before.get(part) != after.get(part)
        ]
        found.append(f"{key}: {'; '.join(parts)}")
    return found


def _shown(old: object, new: object) -> dict[str, str]:
    """Texts for both values and, of two lists, what differs."""
    if not isinstance(old, list) or not isinstance(new, list):
        return {"old": str(old), "new": str(new), "both": f"{old} -> {new}"}
    gone = [f"-{item}" for item in old if item not in new]
    come = [f"+{item}" for item in new if item not in old]
    return {"both": " ".join(gone + come) or "in another order"}

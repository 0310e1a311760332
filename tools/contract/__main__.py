"""Say what of vLLM's seams moved between versions; see the package's docstring."""

from __future__ import annotations

import argparse
from itertools import pairwise

from contract.facts import describe_all, load, save, snapshot_versions
from contract.judge import breaches, changes
from contract.project import installed_version, origin, released_tree, usage


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contract")
    parser.add_argument("versions", nargs="*", help="further versions of vLLM")
    parser.add_argument("--write", action="store_true", help="take their snapshots")
    args = parser.parse_args()
    needs = usage().needs
    versions = list(dict.fromkeys([*snapshot_versions(), installed_version(), *args.versions]))
    versions.sort(key=lambda name: [int(part) for part in name.split(".")])
    facts = {}
    for version in versions:
        is_known = version in snapshot_versions() and not args.write
        facts[version] = load(version) if is_known else describe_all(released_tree(version), needs)
        if args.write:
            save(version, origin(version), facts[version])
    for old, new in pairwise(versions):
        print(f"\n{old} -> {new}\n", *changes(facts[old], facts[new]), sep="\n")
    for version in versions:
        others = {other: found for other, found in facts.items() if other != version}
        found = breaches(needs, facts[version], others)
        print(f"\n{version}: {len(found)} breaches of {len(needs)} needs", *found, sep="\n  ")


if __name__ == "__main__":
    main()

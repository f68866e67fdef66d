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

from dtrain.config.aliases import RENAMED, our_name
from dtrain.config.groups import CONFIGS, group_names, options
from dtrain.config.override import for_a_shell, parsed, value_of
from dtrain.config.secret import masked_override

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
HOLD_LESS = (
    "let a rank hold less, by strategy=fsdp, micro_batch_size, activation_checkpointing=true"
)
NEAR = 0.6  # likeness of two names, of 1: below it none is suggested
NO_MORE_PROCESSES = (
    "the system allows no more processes or threads (ulimit -u, a container's limit of pids): a "
    "rank takes some 15: allow more, or use fewer ranks and launch.threads=1"
)
REFUSED_BY_THE_SYSTEM = {  # RuntimeErrors of pathlib, of threads and of gloo
    "home directory": (
        "a path begins with ~, and there is no such home folder: write it out, or set "
        "DTRAIN_CACHE (data.cache)"
    ),
    "can't start new thread": NO_MORE_PROCESSES,
    "Resource temporarily unavailable": NO_MORE_PROCESSES,
}
NO_MORE_MEMORY = re.compile(
    "can't allocate memory|CUDA out of memory|HIP out of memory|MPS backend out of memory"
)


def check_overrides(arguments: Sequence[str], known: Collection[str] = ()) -> None:
    """Refuse what Hydra would refuse in terms of its grammar.

    Args:
        known: words that may stand there besides key=value.

    Raises:
        ValueError: names the word and what to type.
    """
    flags, unknown = get_args_parser().parse_known_args(list(arguments))
    if file := flags.experimental_rerun:
        raise ValueError(
            f"--experimental-rerun={file}: a pickle runs code, and is not read: a run is "
            f"repeated by --config-dir=RUN/.hydra --config-name=config"
        )
    words = sorted([*flags.overrides, *unknown], key=lambda word: not word.startswith("--"))
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--"):
            name = word.strip("-").split("=")[0]
            raise ValueError(
                f"{masked_override(word)} is no option: settings are key=value without dashes: "
                f"{our_name(name) or name}"
            )
        if "=" not in word and not word.startswith("~"):
            raise ValueError(_no_setting(word, before, known))
        override, word = parsed(word), masked_override(word)
        key, _, value = word.partition("=")
        name = key.lstrip("+~")
        if not name:
            raise ValueError(f"{word} names no key: write key=value")
        if override is None:
            raise ValueError(
                f"{word} is not in Hydra's grammar: as a text it is written "
                f"{for_a_shell(key, value)}"
            )
        if flags.multirun:
            continue
        if override.is_sweep_override():
            raise ValueError(
                f"{word} has several values: a list is {key}=[{value}], one text "
                f"{for_a_shell(key, value)}, and a run for each takes --multirun"
            )
        if name in group_names() and value and not isinstance(value_of(override), str | list):
            raise ValueError(_set_to_a_value(word, name))
    if unknown:
        raise ValueError(
            f"{' '.join(map(masked_override, unknown))}: settings stand together, before or after "
            f"options such as --multirun"
        )


def _no_setting(word: str, before: str, known: Collection[str]) -> str:
    """Say that a word, which comes after `before`, is not key=value."""
    key, _, value = before.partition("=")
    hint = f", and none of the words {', '.join(known)}" if known else ""
    if key.endswith("path"):
        hint = (
            f": a pattern is quoted for the shell, \"{key}='…*'\", and several files are "
            f"{key}=[{value},{word}]"
        )
    return f"{word!r} is no key=value{hint}"


def _set_to_a_value(word: str, group: str) -> str:
    """Say that a group is set to something that is no choice of it."""
    choose = f"{word}: {group} is a group: choose {group}=NAME, of {', '.join(options(group))}"
    keys = [key for key in _keys("train") if key.startswith(f"{group}.") and not key.endswith("_")]
    if not keys:
        return choose
    return f"{choose}, or set a key of it: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"


def system_error(error: BaseException) -> str:
    """Return what an error says of memory, processes or the system; empty: it is another one."""
    text = str(error)
    if not isinstance(error, RuntimeError | MemoryError):
        return ""
    if isinstance(error, MemoryError) or NO_MORE_MEMORY.search(text):
        amount = re.search(r"allocate ([\d.]+ \w+)", text)
        at_once = f" ({amount[1]} at once)" if amount else ""
        return (
            f"there is not as much memory as is asked for{at_once}: a smaller model or "
            f"vocabulary, or {HOLD_LESS}"
        )
    return next((line for part, line in REFUSED_BY_THE_SYSTEM.items() if part in text), "")


def explain(error: BaseException, config_name: str) -> str:
    """Return one line for an error: what is wrong, the value, and what would work."""
    if line := system_error(error):
        return line
    text = str(error)
    for pattern, explanation in PATTERNS.items():
        if match := re.search(pattern, text):
            return explanation(match, error, config_name)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=…"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}"
    if isinstance(error, BlockingIOError):
        return NO_MORE_PROCESSES
    if isinstance(error, OSError) and error.filename:
        return _unusable_file(error, str(error.filename))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, ValueError | ArithmeticError | RuntimeError):
        return "; ".join(lines)
    return lines[0] if lines else type(error).__name__


def _unknown_choice(match: re.Match[str], *_: object) -> str:
    group, name = match.groups()
    choices = options(group)
    listing, alias = ", ".join(choices), our_name(f"{group}={name}") or our_name(name)
    if alias and name.lower() not in choices:
        return f"unknown {group} {name!r}: here it is {alias}"
    near = _nearest(name, choices)
    return f"unknown {group} {name!r}: {f'{near} ({listing})' if near else f'use one of {listing}'}"


def _unknown_key(key: str, config_name: str) -> str:
    if key in group_names():
        return (
            f"group {key!r} has no default to override: append to it with +{key}=…, of "
            f"{', '.join(options(key))}"
        )
    keys = _keys(config_name)
    parent, _, leaf = key.rpartition(".")
    same = [each for each in keys if each.rpartition(".")[2].lower() == leaf.lower()]
    if same and not our_name(key):
        return f"unknown key {key!r}: did you mean {' or '.join(map(repr, same[:3]))}?"
    if alias := our_name(key):
        return f"unknown key {key!r}: here it is {alias}"
    if near := _nearest(key, keys):
        return f"unknown key {key!r}: {near}"
    whole = "hydra" if key.startswith("hydra.") else "job"
    listing = f"--cfg {whole} prints all keys"
    if beside := [each.rpartition(".")[2] for each in keys if each.rpartition(".")[0] == parent]:
        listing = f"{parent or 'the configuration'} has {', '.join(beside)}"
    return f"unknown key {key!r}: {listing}"


def _nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean …?` for the most similar name, ignoring case; empty: none is similar."""
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=NEAR)
    if close and "." in name:  # the last part must be alike by itself
        leaf, other = (each.rpartition(".")[2] for each in (name.lower(), close[0]))
        close = close if difflib.SequenceMatcher(None, leaf, other).ratio() >= NEAR else []
    return f"did you mean {lower[close[0]]!r}?" if close else ""


def _refused_value(match: re.Match[str], error: BaseException, _: str) -> str:
    key = re.split("[=@]", match[1].lstrip("+~"))[0]
    reason = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    if key in RENAMED:
        reason = f"here it is {RENAMED[key]}"
    return f"{masked_override(match[1])}: {reason}"


def _refused_file(match: re.Match[str], _: BaseException, config_name: str) -> str:
    """Say what a configuration's file sets wrongly: Hydra keeps the cause's text alone."""
    file, kind, reason = match[1], match[2], match[3].strip()
    if not (key := re.search(r"full_key: (\S+)", match.string)):
        return f"{file}: {reason}"
    if kind == "ConfigKeyError":
        return f"{file}: {_unknown_key(key[1], config_name)}"
    return f"{file}: {key[1]}: {reason}"


def _missing_of_data(match: re.Match[str], error: BaseException, _: str) -> str:
    key = getattr(error, "full_key", None) or "the configuration"
    return (
        f"{key} is to be {match[1]}, which these data have not: choose another model, or other data"
    )


def _unknown_value(match: re.Match[str], *_: object) -> str:
    """Add the setting to type for another tool's value."""
    alias = our_name(match[2])
    return f"{match.string}; here it is {alias}" if alias else match.string


def _unusable_file(error: OSError, name: str) -> str:
    """Say what is wrong with a file or folder, and which setting asked for it."""
    path = Path(name)
    file = None
    with suppress(OSError):  # of a name that is too long, say
        file = next((each for each in (path, *path.parents) if each.is_file()), None)
    problem = f"{name}: {error.strerror}"
    if file and isinstance(error, FileExistsError | NotADirectoryError):
        problem = f"{file} is a file, and no folder"
    for word in sys.argv[1:]:
        value = value_of(override) if (override := parsed(word)) else None
        if not isinstance(value, str) or not value:
            continue
        if path.absolute().is_relative_to(Path(value).absolute()):
            return f"{masked_override(word)}: {problem}: choose another"
    return problem


# Explains an error: from the match with its pattern, the error, the configuration's name.
Explanation = Callable[[re.Match[str], BaseException, str], str]
PATTERNS: Mapping[str, Explanation] = {
    r"Could not (?:find|load) '([\w/]+)/([^']*)'": _unknown_choice,
    r"^(?:Could not override|unknown key) '([^']+)'": lambda match, _, config_name: _unknown_key(
        match[1], config_name
    ),
    r"^Could not append to config. An item is already at '([^']+)'": lambda match, *_: (
        f"+{match[1]}: {match[1]} is there already: write {match[1]}=… without the +"
    ),
    r"^Could not delete from config. '([^']+)' does not exist": lambda match, *_: (
        f"~{match[1]}: there is no {match[1]} to take away"
    ),
    r"^(~[\w.]+): .* does not support deletion": lambda match, *_: (
        f"{match[1]}: this key cannot be taken away"
    ),
    r"^Error merging override (.*)": _refused_value,
    r"^Error in call to target '[^']*':\n\w+\([\"'](.*)[\"']\)\n(?:full_key: (\S+))?": (
        lambda match, *_: f"{match[2]}: {match[1]}" if match[2] else match[1]
    ),
    r"^In '([^']+)': (\w+) raised while composing config:\n(.*)": _refused_file,
    r"^Key '[^']+' (?:is )?not in ": lambda _, error, config_name: _unknown_key(
        str(getattr(error, "full_key", "")), config_name
    ),
    r"^Interpolation key '([^']+)' not found": _missing_of_data,
    r"^([\w.]+)=(\S+) is unknown: use ": _unknown_value,
}


def _keys(config_name: str) -> list[str]:
    """Return the keys of the configuration with the groups that the command line chooses."""
    GlobalHydra.instance().clear()
    groups = group_names()
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

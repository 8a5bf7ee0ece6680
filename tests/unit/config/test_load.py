"""Recipes, files and overrides become one configuration, or one message with everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_qwenvl.config.fields import plain
from megatron_qwenvl.config.load import ConfigError, dump_yaml, load_config
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig


def problems(recipe: str, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides, world_size)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.mark.parametrize("name", RECIPES)
def test_a_dumped_configuration_reads_back_equal(name: str, write) -> None:
    config = load_config(name, ["--parallel.layout", "[3]", "--parallel.pipeline", "2", "--name", "漢字"])
    assert load_config(write(dump_yaml(config))) == config
    assert config != RECIPES[name]()


def test_a_configuration_from_before_the_families_is_qwen_7b(tmp_path: Path) -> None:
    saved = plain(load_config("stage1"))
    for name in ("family", "query_groups"):
        del saved["model"]["decoder"][name]
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(saved))
    assert load_config(str(path)) == load_config("stage1")
    assert load_config(str(path)).model.decoder.family == "qwen"


def test_overrides_in_both_forms_and_the_last_one_wins() -> None:
    overrides = "--train.steps=7000 --train.steps 9_000 --optimizer.lr 3e-4 --train.frozen [vit,decoder] "
    overrides += (
        "--parallel.sequence_parallel true --parallel.tensor=2 --data.tokenizer=a=b --optimizer.eps 1"
    )
    config = load_config("stage1", overrides.split())
    assert (config.train.steps, config.optimizer.lr, config.train.frozen) == (9000, 3e-4, ("vit", "decoder"))
    assert (config.data.tokenizer, config.optimizer.eps) == ("a=b", 1.0)


TEXTS = [
    "exp #3", "#3", "a: b", "{a}", "[1]", "*x", "&x", "!x", "%x", "@x", "`x`", "|", ">", "-", "-x", "- x", "?", "? x",
    "5", "1_000", "2e-4", "010", "0x10", "1:30", ".5", "true", "no", "null", "~", "2024-01-01", "2024-01-01 10:00:00",
    "  blanks  ", "a  b", "it's", 'say "x"', "'half", '"', "a=b", "größe 漢字", "\t", "a\nb", "x" * 3000, "x y " * 60,
    "C:\\new", "--x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_taken_as_it_is(text: str, write) -> None:
    """Runs named `exp #3` and `exp #4` are two; what is printed and saved reads back equal."""
    config = load_config("stage1", [f"--name={text}", f"--data.root={text}"])
    assert (config.name, config.data.root) == (text, text)
    assert load_config(write(dump_yaml(config))) == config
    if not text.startswith("--"):
        assert load_config("stage1", ["--name", text]).name == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("~", None), ("", None), ("'null'", "null"), ("'exp #3'", "exp #3"), ('"a\\tb"', "a\tb"),
        ("'it''s'", "it's"), ("''", ""), ("'a' #b", "'a' #b"), ("'a', 'b'", "'a', 'b'"), ("nullx", "nullx"),
    ],
)  # fmt: skip
def test_quotes_and_null_on_the_command_line(text: str, value: str | None) -> None:
    assert load_config("stage1", ["--data.tokenizer", text]).data.tokenizer == value


def test_a_section_can_be_overridden_by_a_mapping_and_keeps_its_other_fields() -> None:
    config = load_config("stage1", ["--train", "{steps: 9000, recompute: full}"])
    assert (config.train.steps, config.train.recompute, config.train.frozen) == (9000, "full", ("decoder",))


def test_a_file_changes_what_it_names_and_keeps_the_rest_of_its_base(write) -> None:
    config = load_config(
        write("base: stage2\ntrain: {steps: 5000}\noptimizer:\n  lr: 2e-5\n"), ["--seed", "1"]
    )
    expected = RECIPES["stage2"]()
    assert (config.train.steps, config.optimizer.lr, config.seed) == (5000, 2e-5, 1)
    assert (config.data, config.train.gradient_accumulation) == (expected.data, 8)


def test_a_file_without_a_base_starts_from_the_schema(write) -> None:
    config = load_config(write("data: {sources: [{name: a, path: b}]}\n"))
    assert config.model == RunConfig().model
    assert config.data.sources[0].path == "b"


def test_a_base_may_be_another_file_beside_the_first(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/common.yaml").write_text("base: stage2\ntrain: {steps: 5000}\nseed: 1\n")
    (tmp_path / "site/long.yaml").write_text("base: common.yaml\nseed: 2\n")
    (tmp_path / "mine.yml").write_text("base: site/long.yaml\nname: mine\n")
    config = load_config(str(tmp_path / "mine.yml"), ["--optimizer.lr", "1e-4"])
    assert (config.name, config.seed, config.train.steps, config.optimizer.lr) == ("mine", 2, 5000, 1e-4)
    assert config.data == RECIPES["stage2"]().data


def test_problems_of_a_base_file_name_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: stage1\ntrain: {stpes: 5}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptimiser: 3\n")
    message = problems(str(tmp_path / "run.yaml"))
    assert f"train.stpes: unknown key ({tmp_path}/base.yaml)" in message
    assert f"optimiser: unknown key ({tmp_path}/run.yaml)" in message
    (tmp_path / "run.yaml").write_text("base: gone.yaml\n")
    message = problems(str(tmp_path / "run.yaml"))
    assert message.startswith(f"{tmp_path}/run.yaml: base: {tmp_path}/gone.yaml: cannot be read")
    (tmp_path / "gone.yaml").symlink_to("gone.yaml")
    assert "gone.yaml: cannot be read: [Errno 40]" in problems(str(tmp_path / "run.yaml"))


def test_files_that_are_based_on_each_other_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert f"{a}: base: files are based on each other: {a} -> {b} -> {a}" in problems(str(a))


def test_one_source_is_changed_by_its_name(write) -> None:
    before = {source.name: source for source in load_config("tiny_stage2").data.sources}
    names = list(before)
    changed = ["--data.sources." + names[1] + ".weight", "0.25", f"--data.sources.{names[0]}.path=a#b"]
    after = {source.name: source for source in load_config("tiny_stage2", changed).data.sources}
    assert list(after) == names
    assert after[names[1]] == before[names[1]].model_copy(update={"weight": 0.25})
    assert after[names[0]] == before[names[0]].model_copy(update={"path": "a#b"})
    assert [after[name] for name in names[2:]] == [before[name] for name in names[2:]]
    file = write(f"base: tiny_stage2\ndata: {{sources: {{{names[1]}: {{weight: 0.25}}}}}}\n")
    assert load_config(file).data.sources[1] == after[names[1]]


def test_the_last_change_of_a_source_wins() -> None:
    given = ["--data.sources", "[{name: v1.5, path: b}]", "--data.sources.v1.5.weight", "2"]
    assert load_config("stage1", given).data.sources[0].weight == 2
    assert "data.sources.v1.5.weight: unknown source" in problems("stage1", *given[2:], *given[:2])


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("sources.captoin.weight", "2", "unknown source (--data.sources.captoin.weight): expected one of"),
        ("sources.caption.wieght", "2", "unknown key (--data.sources.caption.wieght); did you mean weight?"),
        ("sources.caption.weight", "-1", "greater than 0, found -1"),
        ("sources.caption.weight", "much", 'expected a valid number, found "much"'),
        ("sources.caption", "2", "data.sources.caption: unknown key"),
        ("sources.caption.name", "x", "data.sources.caption.name: unknown key"),
        ("sources", "{}", "data.sources: expected a list, such as"),
    ],
)
def test_a_wrong_change_of_a_source_is_explained(field: str, value: str, found: str) -> None:
    message = problems("stage1", "--data.sources", "[{name: caption, path: b}]", f"--data.{field}", value)
    assert "1 problem\n" in message and found in message


def test_everything_wrong_is_in_one_message(write) -> None:
    text = problems(
        write("base: stage1\ntrain: {stpes: 5}\noptimizer: {min_lr: 1}\n"),
        *("--train.precision", "fp16", "--steps=3", "--parallel.tensor", "3", "stray", "--name"),
        world_size=4,
    )
    for expected in (
        "13 problems",
        "train.stpes: unknown key",
        "did you mean train.steps?",
        "steps: unknown key (--steps); did you mean train.steps?",
        "train.precision: expected 'bf16' or 'fp32', found \"fp16\"",
        "unexpected argument 'stray'",
        "--name: expected a value, found none",
        "optimizer.min_lr: expected at most optimizer.lr (0.0002), found 1.0",
        "model.vision.heads: expected a multiple of parallel.tensor (3), found 16",
        "found 4",
    ):
        assert expected in text, expected
    assert all(line.startswith("  ") for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("override", "found"),
    [
        (("--train.steps", "abc"), 'train.steps: expected a valid integer, found "abc"'),
        (("--train.steps", "2.5"), "train.steps: expected a valid integer, found 2.5"),
        (("--train.steps", "true"), "train.steps: expected a valid integer, found true"),
        (("--train.steps", "010"), 'train.steps: expected a valid integer, found "010"'),
        (("--train.steps", "0"), "train.steps: expected greater than or equal to 1, found 0"),
        (("--train.steps="), "train.steps: expected a valid integer, found null"),
        (
            ("--train.steps", "5 #7"),
            "--train.steps: '5 #7': '#7' would be left out as a comment: write text with",
        ),
        (
            ("--data.sources", "- name: a\n  path: b #1"),
            "'#1' would be left out as a comment: write text with # in it in quotes",
        ),
        (("--run_dir="), "run_dir: expected a valid string, found null"),
        (("--name", "a\udcff"), "expected UTF-8"),
        (
            ("--name", "--5"),
            "--name: expected a value, found none (one that begins with -- is given as --name=VALUE)",
        ),
        (("--optimizer.lr", "fast"), 'optimizer.lr: expected a valid number, found "fast"'),
        (("--optimizer.beta2", "1"), "optimizer.beta2: expected less than 1, found 1"),
        (("--logging.tensorboard", "yes"), 'logging.tensorboard: expected a valid boolean, found "yes"'),
        (("--train.frozen", "vit"), 'train.frozen: expected a list, such as [a, b], found "vit"'),
        (
            ("--train.frozen", "[vit, head]"),
            "train.frozen.1: expected 'vit', 'adapter', 'adapter_output' or 'decoder'",
        ),
        (("--data.sources", "[{name: a, paht: b}]"), "data.sources.0.paht: unknown key; did you mean path?"),
        (("--data.sources", "[{name: a}]"), "data.sources.0.path: required but not given"),
        (("--data.sources", "[a, b"), "--data.sources: '[a, b' is not valid YAML"),
        (("--seed", "&a [*a]"), "--seed: '&a [*a]' is not valid YAML: found unconstructable recursive node"),
        (("--data.sources", "&a {b: *a}"), "is not valid YAML: found unconstructable recursive node"),
        (("--train", "5"), "train: expected a mapping of fields, found 5"),
        (("--trian.steps", "5"), "trian.steps: unknown key (--trian.steps); did you mean train.steps?"),
        (("--train.steps.more", "5"), "train.steps.more: unknown key"),
        (
            ("--train.stesp", "--seed"),
            "--train.stesp: expected a value, found none; did you mean train.steps?",
        ),
        (("--train", "{steps: 1, steps: 2}"), "key 'steps' appears twice"),
    ],
)
def test_a_bad_override_is_explained(override: tuple[str, ...] | str, found: str) -> None:
    arguments = (override,) if isinstance(override, str) else override
    assert found in problems("stage1", *arguments)


def test_a_contradiction_with_an_unreadable_value_is_not_reported() -> None:
    text = problems("stage1", "--parallel.tensor", "two", "--parallel.sequence_parallel", "true")
    assert "1 problem\n" in text
    assert "parallel.tensor: expected a valid integer" in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("base: stage4\n", "base: unknown recipe 'stage4': expected one of stage1, "),
        (
            "base: [a.yaml, b.yaml]\n",
            'base: expected the name of a recipe or a file, found ["a.yaml", "b.yaml"]',
        ),
        ("base: {file: a.yaml}\n", 'base: expected the name of a recipe or a file, found {"file": "a.yaml"}'),
        ("base: 5\n", "base: expected the name of a recipe or a file, found 5"),
        ('base: "a\\0.yaml"\n', "cannot be read: embedded null byte"),
        ("train: [\n", "not valid YAML: "),
        ("a: " + "[" * 1000, "not valid YAML: maximum recursion depth exceeded"),
        ('name: "\\ud800"\n', "holds half of a surrogate pair"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        (
            "base: stage1\ndata: {sources: {sbu: {weight: heavy}}}",
            'data.sources.sbu.weight: expected a valid number, found "heavy"',
        ),
        ("a: 1\na: 2\n", "key 'a' appears twice in line 2, column 1"),
        ("- 1\n", "expected a mapping of sections, found [1]"),
        ("", "expected a mapping of sections, found null"),
        ("train:\nbase: stage1\n", "train: expected a mapping of fields, found null"),
        ("base: stage1\n5: 6\n", "5: unknown key"),
        (
            "base: stage1\nname: 2024-01-01\nseed: 2024-01-01\n",
            'seed: expected a valid integer, found "2024-01-01"',
        ),
    ],
)
def test_a_bad_file_is_explained(text: str, found: str, write) -> None:
    path = write(text)
    message = problems(path)
    assert found in message
    assert path in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in problems(str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: cannot be read" in problems(str(tmp_path / "folder.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "latin.yaml: cannot be read" in problems(str(tmp_path / "latin.yaml"))


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert problems("stgae1").endswith("or a .yaml file; did you mean stage1?")


def test_a_recipe_whose_name_no_file_can_have_is_unknown() -> None:
    assert "unknown recipe" in problems("x" * 300)
    assert "cannot be read" in problems("x" * 300 + ".yaml")

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.launch.compose import compose, dotted, merge, option_layer, origin


def failure(path) -> str:
    with pytest.raises(InputError) as caught:
        compose(path)
    return str(caught.value)


def test_parents_come_before_children_and_the_last_one_wins(write):
    write("configs/base.yaml", "trainer: {max_steps: 1, devices: 1}\n")
    write("configs/size/tiny.yaml", "include: ../base.yaml\ntrainer: {max_steps: 2}\n")
    leaf = write("configs/leaf.yaml", "include: [base.yaml, size/tiny.yaml]\nseed_everything: 3\n")
    layers = compose(leaf)
    assert [layer.name for layer in layers] == ["configs/base.yaml", "configs/size/tiny.yaml", "configs/leaf.yaml"]
    assert merge(layers) == {"trainer": {"max_steps": 2, "devices": 1}, "seed_everything": 3}


def test_a_parent_that_two_files_share_does_not_undo_what_came_between(write):
    write("base.yaml", "a: 1\n")
    write("left.yaml", "include: base.yaml\na: 2\n")
    write("right.yaml", "include: base.yaml\nb: 3\n")
    assert merge(compose(write("leaf.yaml", "include: [left.yaml, right.yaml]\n"))) == {"a": 2, "b": 3}


def test_lists_are_replaced_and_a_plus_appends(write):
    write("base.yaml", "x: [1]\ny: [1]\n")
    assert merge(compose(write("leaf.yaml", "include: base.yaml\nx: [2]\ny+: [2]\n"))) == {"x": [2], "y": [1, 2]}


def test_every_key_knows_its_file_and_line(write):
    write("base.yaml", "trainer:\n  max_steps: 1\n  devices: 1\n")
    layers = compose(
        write("leaf.yaml", "include: base.yaml\ntrainer:\n  max_steps: 2\ndata:\n  sources:\n  - path: x\n")
    )
    assert origin(layers, ("trainer", "devices")) == "base.yaml, line 3"
    assert origin(layers, ("trainer", "max_steps")) == "leaf.yaml, line 3"
    assert origin(layers, ("data", "sources", 0, "path")) == "leaf.yaml, line 6"
    assert origin(layers, ("data", "sources", 0, "missing")) == "leaf.yaml, line 6"
    assert origin(layers, ("nowhere",)) == "leaf.yaml"
    layers.append(option_layer("trainer.max_steps", "5"))
    assert origin(layers, ("trainer", "max_steps")) == "command line"
    assert origin(layers, ("trainer", "devices")) == "base.yaml, line 3"


def test_a_key_path_reads_as_in_python():
    assert dotted(("data", "init_args", "sources", 0, "path")) == "data.init_args.sources[0].path"


def test_numbers_in_scientific_notation_are_numbers(write):
    assert merge(compose(write("x.yaml", "a: 1e-5\nb: 5.0E-7\nc: 1.5\nd: 3\ne: v1e5\n"))) == {
        "a": 1e-5,
        "b": 5e-7,
        "c": 1.5,
        "d": 3,
        "e": "v1e5",
    }


def test_merge_keys_of_yaml_are_no_duplicates(write):
    assert merge(compose(write("x.yaml", "a: &a {p: 1}\nb:\n  <<: *a\n  p: 2\n")))["b"] == {"p": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: is empty. Give at least one setting."),
        ("# only a comment\n", "x.yaml: is empty. Give at least one setting."),
        ("- a\n- b\n", "x.yaml: holds a list, not a mapping. Write `key: value` lines."),
        (
            "a: 1\nb: [1\nc: 2\n",
            "x.yaml, line 3: is not valid YAML: expected ',' or ']', but got ':'. "
            "Check indentation, colons and quotes there.",
        ),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "x.yaml, line 4: 'c' is given twice, first in line 3. Keep one."),
        ("a: &a [*a]\n", "x.yaml, line 1: an alias contains itself. Write the value out."),
        ("include: 3\n", "x.yaml, line 1: include is 3. Give a list of file names."),
        (
            "a: 1\ninclude: [base.yaml]\n",
            "x.yaml: includes base.yaml, which does not exist. "
            "Names in `include` are relative to the file that includes them.",
        ),
        (
            "include: [x.yaml]\n",
            "x.yaml: includes itself: x.yaml -> x.yaml. Take one of these out of `include`.",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_line(write, text, message):
    assert failure(write("x.yaml", text)) == message


def test_a_cycle_is_told_as_a_chain(write):
    write("a.yaml", "include: b.yaml\n")
    write("b.yaml", "include: a.yaml\n")
    leaf = write("leaf.yaml", "include: a.yaml\n")
    assert failure(leaf) == "b.yaml: includes itself: a.yaml -> b.yaml -> a.yaml. Take one of these out of `include`."


def test_a_missing_file_and_a_binary_one_are_named(write, tmp_path):
    write("x.yaml", "a: 1")
    assert failure("nope.yaml") == (
        "nope.yaml: cannot be read (No such file or directory). "
        "Give the path of a YAML file, e.g. --config configs/sft_tiny.yaml."
    )
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    assert failure("bin.yaml") == "bin.yaml: is not UTF-8 text. Give a YAML file."

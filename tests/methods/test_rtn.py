"""RTN: its grids, what its bits add up to, how an average is met, what is recorded and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from weight_models import FAMILIES, SHAPE, linears

from sparsebench import audits
from sparsebench.costs.storage import weight_bytes
from sparsebench.errors import UserError
from sparsebench.kernels.stored import stored_form
from sparsebench.kernels.swap import swapped
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import walk
from sparsebench.methods.weights.bits import LEVELS, Form, Matrix, recipe, solve
from sparsebench.methods.weights.gqsa import GQSA
from sparsebench.methods.weights.gqsa_groups import TERNARY, Grouped, centred, count_of, cut
from sparsebench.methods.weights.rtn import RTN
from sparsebench.models.base import LoadedModel


def apply(model, method):
    stack = [("rtn", method)]
    walk.check(stack, model)
    return walk.apply(stack, Surroundings(LoadedModel(model, None, "toy", 64), lambda: None, 0))


def random_weight(seed, rows=6, columns=40):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight, group, bits, symmetric, scale_bits=32):
    kept = torch.ones(len(weight), count_of(weight.shape[1], group), dtype=torch.bool)
    found = Grouped(weight, kept, group, bits, True, scale_bits, symmetric or bits < 2)
    found.freeze()
    return found, found(weight).detach()


def tied(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()


# grids


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [8, 16, 40])
def test_every_weight_goes_to_the_nearest_level_of_its_group(bits, symmetric, group):
    weight = random_weight(3) + 0.3
    found, values = rounded(weight, group, bits, symmetric)
    codes = torch.arange(3 if bits == TERNARY else 2 ** int(bits))
    if (symmetric or bits < 2) and bits >= 2:
        codes = codes[:-1]  # as many on either side of 0
    levels = found.scale.detach() * (codes - found.zero.detach())  # (groups, codes)
    groups = cut(weight, group).flatten(0, 1)
    distance = (groups[:, :, None] - levels[:, None]).abs().amin(dim=2)
    got = (cut(values, group).flatten(0, 1) - groups).abs()
    torch.testing.assert_close(got, distance, rtol=1e-4, atol=1e-5)
    if symmetric or bits < 2:
        torch.testing.assert_close(levels, -levels.flip(1))
        _, other = rounded(-weight, group, bits, symmetric)
        assert bits == 1 or torch.equal(other, -values)


@pytest.mark.parametrize("bits", [one for one in LEVELS if one > 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_zero_and_what_is_on_the_grid_stays(bits, symmetric):
    weight = random_weight(5)
    weight[:, ::3] = 0
    weight[2] = 0
    _, values = rounded(weight, 8, bits, symmetric)
    assert (values[weight == 0] == 0).all()
    _, again = rounded(values, 8, bits, symmetric)
    if bits != TERNARY:  # its level is a mean
        torch.testing.assert_close(again, values)


def test_three_and_two_levels_are_those_of_the_formulas():
    weight = torch.tensor([[1.0, -1.0, 0.1, -0.3, 4.0, 0.0, -5.0, 1.0, 2.0, 6.0]])  # the last group has two entries
    scale, zero = centred(weight, 4, TERNARY)
    assert scale.tolist() == [[1.0, 4.5, 6.0]] and zero.eq(1).all()
    found, values = rounded(weight, 4, TERNARY, True)
    assert values.tolist() == [[1, -1, 0, 0, 4.5, 0, -4.5, 0, 0, 6]]
    _, values = rounded(weight, 4, 1, True)
    torch.testing.assert_close(values[0, [0, 1, 4, 6, 8]], torch.tensor([0.6, -0.6, 2.5, -2.5, 4.0]))
    assert found.stored().bits == 3 * (-(-4 * 8 // 5) + 32), "five codes a byte"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 60), st.integers(4, 64), st.sampled_from(LEVELS), st.booleans(),
    st.sampled_from([16, 32]),
)  # fmt: skip
def test_what_a_matrix_takes_is_known_beforehand(rows, columns, group, bits, symmetric, scale_bits):
    weight = nn.Parameter(random_weight(rows * 100 + columns, rows, columns))
    group = min(group, columns)
    form = Form(bits, group, symmetric or bits < 2, scale_bits)
    assert form.takes(weight) == rounded(weight, group, bits, symmetric, scale_bits)[0].stored().bits


def test_it_is_what_gqsa_rounds_without_pruning_and_recovery(make):
    one, other = make(), make()
    apply(one, RTN(group_size=8))
    alone = GQSA(sparsity=0, group_size=8, include_zero=True, bqpo_enable=False, e2e_enable=False, saliency="magnitude")
    walk.apply([("gqsa", alone)], Surroundings(LoadedModel(other, None, "toy", 64), lambda: None, 0))
    assert all(
        torch.equal(a.weight, b.weight) for a, b in zip(linears(one).values(), linears(other).values(), strict=True)
    )


# what it does to a model


@pytest.mark.parametrize("bits", [1, TERNARY, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_the_layers_in_scope_change_and_none_becomes_sparser(make, bits, symmetric):
    model, before = make(), audits.fingerprint(make())
    method = RTN(bits=bits, group_size=16, symmetric=symmetric, exclude=("*v_proj",))
    applied = apply(model, method)
    achieved = audits.count(model, applied)
    assert achieved.scope == achieved.model == 0 and achieved.asked is None and not achieved.missed
    assert all(check.held for check in audits.audit(model, applied, achieved, before, False))
    after = audits.fingerprint(model)
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {f"{name}.weight" for name in linears(model) if not name.endswith("v_proj")}
    assert applied.acts_on == changed and applied.notes["groups_quantised"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_average_counts_every_parameter_once(family):
    kind, config = FAMILIES[family]
    for bits, target in ((4, None), (None, 7.0)):
        torch.manual_seed(0)
        model = kind(config).eval()
        applied = apply(model, RTN(bits=bits, target_avg_bits=target, group_size=16))
        modules = [one for one in model.modules() if isinstance(one, (nn.Linear, nn.Embedding))]
        stored = {id(one.weight): form for one in modules if (form := stored_form(one, one.weight))}
        parameters = [(stored.get(id(one)), one.numel()) for one in model.parameters()]
        counted = sum(32 * size if form is None else form.bits for form, size in parameters)
        entries = sum(one.numel() for one in model.parameters())
        assert applied.notes["bits_average"] == pytest.approx(counted / entries)
        if target is not None:
            assert target - 0.5 < applied.notes["bits_average"] <= target
            assert {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)} <= set(stored)


def test_a_tied_head_is_one_matrix_and_its_bytes_are_counted_once():
    model = tied()
    before = weight_bytes(model).sparse
    applied = apply(model, RTN(target_avg_bits=5.0, group_size=32))
    size = weight_bytes(model)
    assert size.dense == before and 8 * size.sparse / sum(p.numel() for p in model.parameters()) < 6
    form = stored_form(model.lm_head, model.lm_head.weight)
    assert (
        form is stored_form(model.model.embed_tokens, model.model.embed_tokens.weight) and form.format == "6-bit groups"
    )
    assert applied.notes["bits_of_layers"].endswith("of 6")
    assert "model.embed_tokens.weight" not in apply(tied(2), RTN(target_avg_bits=8, exclude=("lm_head",))).acts_on
    again = tied(1)
    assert "model.embed_tokens.weight" not in apply(again, RTN(bits=4, group_size=32)).acts_on


def test_four_bits_run_on_the_kernel(make):
    model = make()
    apply(model, RTN(group_size=16, symmetric=True))
    ids = torch.arange(1, 2)[None]
    with torch.no_grad():
        right = model(input_ids=ids).logits
        with swapped(model) as swap:
            assert len(swap.layers) == 21
            torch.testing.assert_close(model(input_ids=ids).logits, right, rtol=1e-4, atol=1e-4)


# meeting an average


WANTED = {"a": 4.0, "b": None, "c": None, "d": 6.0, "e": None}
SIZES = {"a": 100, "b": 300, "c": 200, "d": 50, "e": 350}


def cost(name, bits):
    return SIZES[name] * round(10 * (1.6 if bits == TERNARY else bits))


@settings(max_examples=200, deadline=None)
@given(st.integers(9_000, 90_000), st.sets(st.sampled_from(sorted(WANTED)), min_size=1))
def test_no_layer_of_the_low_class_could_have_more(room, names):
    wanted = {name: bits for name, bits in WANTED.items() if name in names}
    found = solve(wanted, cost, room)
    least = sum(cost(name, 1) for name in wanted)
    assert (found is None) == (room < least)
    if found is None:
        return
    bits, cap = found
    spare = room - sum(cost(name, one) for name, one in bits.items())
    assert spare >= 0 and set(bits.values()) <= set(LEVELS)
    low = sorted({bits[name] for name in wanted if wanted[name] is None}, key=LEVELS.index)
    assert len(low) <= 2 and (len(low) < 2 or LEVELS.index(low[1]) == LEVELS.index(low[0]) + 1)
    for name, one in bits.items():
        if wanted[name] is None and one == low[0] and one < LEVELS[-1]:
            assert cost(name, LEVELS[LEVELS.index(one) + 1]) - cost(name, one) > spare
        if wanted[name] is not None and cap is None:
            assert one >= wanted[name]


def test_the_recipe_gives_way_only_when_the_low_class_has_nothing_left():
    full = sum(cost(name, 1 if bits is None else bits) for name, bits in WANTED.items())
    assert solve(WANTED, cost, full) == ({"a": 4, "b": 1, "c": 1, "d": 6, "e": 1}, None)
    assert solve(WANTED, cost, full - 1)[1] == 5  # the head's 6 bits, first
    assert solve(WANTED, cost, 80_000)[0] == dict.fromkeys(WANTED, 8)


def matrix(name, block=None, head=False):
    layer = nn.Linear(4, 4)
    return Matrix((name,), layer.weight, (layer,), block, head)


def test_the_classes_of_the_recipe():
    dense = [matrix(f"model.layers.{k}.{name}", k) for k in range(11)
             for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]  # fmt: skip
    found = recipe([*dense, matrix("model.embed_tokens"), matrix("lm_head", head=True)], 11)
    assert (found["model.embed_tokens"], found["lm_head"], found["model.layers.7.self_attn.q_proj"]) == (4, 6, 4)
    down = [found[f"model.layers.{k}.mlp.down_proj"] for k in range(11)]
    assert down == [6, 6] + [None] * 9 and found["model.layers.0.mlp.gate_proj"] is None
    experts = [matrix("h.0.mlp.up_proj", 0), matrix("h.1.mlp.shared_experts.up_proj", 1), matrix("h.1.mlp.gate", 1),
               matrix("h.1.mlp.experts.0.up_proj", 1), matrix("h.1.mlp.experts.0.down_proj", 1)]  # fmt: skip
    assert [*recipe(experts, 2).values()] == [6, 6, 6, None, None]


def test_stacked_experts_are_the_low_class_of_a_model_that_has_them():
    torch.manual_seed(0)
    shape = {**SHAPE, "num_local_experts": 4, "intermediate_size": 256, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape)).eval()
    before = audits.fingerprint(model)
    applied = apply(model, RTN(target_avg_bits=2.51, group_size=32))
    assert 2.4 < applied.notes["bits_average"] <= 2.51 and not applied.warnings, "experts are most of it: no cap"
    after = audits.fingerprint(model)
    assert {name for name in after if after[name] != before[name]} == applied.acts_on
    first, last = model.model.layers[0].mlp.experts, model.model.layers[2].mlp.experts
    levels = [len(weight[3, 5].unique()) for weight in (first.gate_up_proj[..., :32], last.down_proj[..., :32])]
    assert levels == [3, 2], "earlier blocks have more"
    assert applied.notes["bits_of_layers"] == "3 of 1, 2 of 1.58, 13 of 4, 2 of 6"


def test_a_target_is_met_from_below_and_fewer_bits_are_worse(make):
    errors = []
    for target in (6.0, 4.0, 2.51, 1.9):
        model, plain = make(), make()
        notes = apply(model, RTN(target_avg_bits=target, group_size=32)).notes
        assert target - 0.35 < notes["bits_average"] <= target
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        errors.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert errors == sorted(errors)


# tables


def table(folder: Path, content) -> str:
    file = folder / "bits.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_a_table_sets_bits_and_groups_of_what_it_names(make, tmp_path):
    rules = {"*.0.*q_proj": 16, "*q_proj": {"bits": 2, "group_size": 8}, "*attn*": 8, "lm_head": 6}
    model, plain = make(), make()
    method = RTN(bits=3, table=table(tmp_path, rules))
    apply(model, method)
    for name, layer in linears(model).items():
        form = stored_form(layer, layer.weight)
        if name.endswith("0.self_attn.q_proj"):
            assert form is None and torch.equal(layer.weight, linears(plain)[name].weight)
        else:
            wanted = "2" if "q_proj" in name else "8" if "attn" in name else "3"
            assert form.format == f"{wanted}-bit groups"
    layer = linears(model)["model.layers.1.self_attn.q_proj"]
    assert stored_form(layer, layer.weight).bits == layer.weight.numel() // 8 * (8 * 2 + 16 + 2)
    assert stored_form(model.lm_head, model.lm_head.weight).format == "6-bit groups"
    assert stored_form(model.model.embed_tokens, model.model.embed_tokens.weight) is None


def test_a_target_scales_what_a_table_calls_low(make, tmp_path):
    file = table(tmp_path, {"*gate_proj": 8, "*attn*": "low", "*up_proj": {"bits": "low", "group_size": 16}})
    model = make()
    method = RTN(target_avg_bits=4.0, group_size=32, table=file)
    notes = apply(model, method).notes
    plan = method.plan(model, [layer for block in walk.scoped_layers(model, method, 0) for layer in block])
    chosen = {name: form.bits for name, form in plan.forms.items()}
    assert {bits for name, bits in chosen.items() if "gate" in name} == {8}
    assert max(bits for name, bits in chosen.items() if "attn" in name) < 4 <= notes["bits_average"] + 0.3


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ({"*nothing": 4}, {}, r"\*nothing fits no layer in scope, such as model\.layers\.0"),
        ({"*q_proj": 7}, {}, r"\*q_proj: bits=7: must be 1, 1\.58, 2, 3, 4, 5, 6, 8, 16 \(as it is\) or low"),
        ({"*q_proj": True}, {}, r"bits=True: must be"),
        ({"*q_proj": {"group_size": 4}}, {}, r"must be bits, or a mapping of bits and group_size"),
        ({"*q_proj": {"bits": 4, "groups": 4}}, {}, r"must be bits, or a mapping"),
        ({"*q_proj": {"bits": 4, "group_size": 3}}, {}, r"group_size=3: must be a whole number >= 4"),
        ({"*q_proj": [4]}, {}, r"bits=\[4\]: must be"),
        ({"*q_proj": "low"}, {}, r"q_proj is low, which goes with target_avg_bits"),
        ({"*": 16}, {}, r"leaves every layer as it is"),
        ("a: [", {}, r"not valid YAML or JSON"),
        ("[1]", {}, r"must map patterns of layer names to bits, such as"),
    ],
    ids=range(11),
)
def test_tables_that_do_not_fit_are_refused_in_one_line(make, tmp_path, content, options, reason):
    with pytest.raises(UserError, match=rf"^table=.*bits\.json: .*{reason}") as found:
        walk.check([("rtn", RTN(table=table(tmp_path, content), **options))], make())
    assert "\n" not in str(found.value)


# the command line


def test_a_run_without_sparsity_says_what_it_took(command):
    words = "model=tiny_reasoner task=reasoning_facts task.samples=8 task.len_bins=2 model.device=cpu".split()
    answer = command("method=dynamic_quant", *words)
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert record["status"] == "ok" and not record["flagged"] and record["sparsity"] is None and record["achieved"] == 0
    assert 2.4 < record["bits_average"] <= 2.51 and "at most 3 bits to attention" in record["warnings"]
    assert f"bits       {record['bits_average']:.3f} a parameter of the whole model" in answer.out
    assert record["bytes_weights"] * 8 == pytest.approx(record["bits_average"] * 350_112, rel=1e-4)
    assert record["flops_prefill"] == record["flops_prefill_dense"] and record["seed"] is None


def test_it_goes_with_what_acts_while_the_model_runs(command):
    answer = command(
        *"method=[rtn,mustafar] model=tiny_100k method.rtn.bits=8 kernel=none task.windows=2 task.context=64".split(),
        *"task.protocol=continuation sparsity=0.5 model.device=cpu".split(),
    )
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert 0.4 < record["achieved_kv_cache"] <= 0.5 and record["bits_average"] > 8


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("method=rtn method.rtn.bits=7", "method.rtn.bits=7.0: not a choice"),
        ("method=rtn method.rtn.bits=4 method.rtn.target_avg_bits=2", "bits=4: target_avg_bits finds the bits"),
        ("method=rtn method.rtn.target_avg_bits=0.9", "target_avg_bits=0.9: this model can have 1."),
        ("method=rtn method.rtn.target_avg_bits=12", "target_avg_bits=12: this model can have 1."),
        ("method=rtn method.rtn.target_avg_bits=0", "method.rtn.target_avg_bits=0"),
        ("method=rtn method.rtn.group_size=2", "method.rtn.group_size=2: must be a whole number >= 4"),
        ("method=rtn method.rtn.table=none.yaml", "method.rtn.table=none.yaml: cannot be read"),
        ("method=rtn method.rtn.sparsity=0.5", "method.rtn.sparsity: unknown option"),
        ("method=rtn method.rtn.include=[nothing]", "no linear layer is left in scope"),
        ("method=[wanda,rtn]", "method=[wanda,rtn]: both select on weights"),
        ("method=[rtn,perp]", "method: perp does not stack on rtn, which rounds for good"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_starts(command, words, reason):
    answer = command(*words.split(), "model=tiny_100k", "model.device=cpu")
    assert answer.code == 2 and reason in answer.err and len(answer.err.strip().splitlines()) == 1, answer.err
    assert not answer.records

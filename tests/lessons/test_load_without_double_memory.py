"""The reference against loaders that are not ours: torch's, safetensors' and transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from llmcourse import exercise, judging, source
from llmcourse.counting import PeakMemory, can_read_memory, memory_error_bytes, on_tmpfs, settle
from llmcourse.engine import Answer, Engine
from llmcourse.lessons.parameter_loading.load_without_double_memory import (
    load_without_double_memory,
)
from llmcourse.zygote import Zygote
from tests.peers import peer


class Tied(nn.Module):
    """Names and shapes of a small language model; `scale` is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.hidden.bias.requires_grad_(False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.register_buffer("scale", torch.arange(1.0, 7.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.norm(self.embed(tokens))) * self.scale)


@pytest.fixture
def saved(tmp_path: Path, seed: int) -> tuple[Tied, str]:
    torch.manual_seed(seed)
    module = Tied()
    module(torch.arange(11))  # the running statistics move away from their start
    path = str(tmp_path / "model.safetensors")
    save_model(module, path)
    return module.eval(), path


def test_logits_equal_those_of_safetensors_load_model(saved):
    module, path = saved
    theirs = Tied().eval()
    load_model(theirs, path)
    ours = load_without_double_memory(Tied, path).eval()
    tokens = torch.arange(11)
    assert torch.equal(ours(tokens), theirs(tokens))
    assert torch.equal(ours(tokens), module(tokens))


def test_state_equals_that_of_a_mapped_torch_checkpoint(saved, tmp_path):
    module, path = saved
    torch.save(module.state_dict(), tmp_path / "model.pt")
    theirs = Tied()
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", mmap=True), assign=True)
    ours = load_without_double_memory(Tied, path)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert ours.state_dict()[name].dtype == tensor.dtype, name


def test_tied_weights_share_their_memory_and_their_gradient(saved):
    ours = load_without_double_memory(Tied, saved[1])
    assert ours.head.weight is ours.embed.weight
    assert ours.head.weight.data_ptr() == ours.embed.weight.data_ptr()
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    assert (
        len(optimizer.param_groups[0]["params"]) == 4
    )  # embed, norm's two, hidden.weight; hidden.bias is frozen


def test_nothing_stays_on_the_meta_device(saved):
    ours = load_without_double_memory(Tied, saved[1])
    assert not [name for name, tensor in ours.named_parameters() if tensor.is_meta]
    assert not [name for name, tensor in ours.named_buffers() if tensor.is_meta]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda held: held.pop("hidden.bias"), KeyError, "hidden.bias"),
        (lambda held: held.update(more=torch.ones(2)), KeyError, "more"),
        (lambda held: held.update({"hidden.bias": torch.ones(6, 1)}), ValueError, "hidden.bias"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_a_file_that_does_not_fit_is_refused(saved, tmp_path, change: Callable, error, message):
    held = {name: tensor for name, tensor in saved[0].state_dict().items() if name != "embed.weight"}
    change(held)
    path = str(tmp_path / "other.safetensors")
    save_file({name: tensor.clone() for name, tensor in held.items()}, path)
    with pytest.raises(error, match=message):
        load_without_double_memory(Tied, path)


@pytest.mark.skipif(
    not can_read_memory(), reason="this system does not say how much memory a process allocated"
)
def test_a_mapped_file_allocates_nothing(tmp_path):
    path, width = str(tmp_path / "model.safetensors"), 2048
    save_file({"weight": torch.full((width, width), 3.0), "bias": torch.zeros(width)}, path)
    memory = PeakMemory()
    settle()
    memory.start()
    module = load_without_double_memory(lambda: nn.Linear(width, width), path)
    assert float(module.weight.detach().mean()) == 3.0
    memory.stop()
    peak_bytes = memory.counts()["peak anonymous bytes"][0]
    # 16 MiB are in the file. Reading the header and making a module takes pages too: 1 MiB is room for them.
    assert peak_bytes is not None and peak_bytes <= (1 << 20) + memory_error_bytes()


COPIES_INTO_SHARED_MEMORY = """
import torch
from collections import defaultdict
from safetensors.torch import load_file as mapped
from torch import Tensor, nn
from collections.abc import Callable

def load_file(path):
    found = mapped(path)
    for _ in range({copies}):
        found = {{name: tensor.clone().share_memory_() for name, tensor in found.items()}}
        kept.append(found)
    return found

kept = []
{reference}
"""


@pytest.mark.skipif(
    not can_read_memory(), reason="this system does not say how much memory a process allocated"
)
@pytest.mark.skipif(not on_tmpfs("/dev/shm"), reason="needs a folder in memory")
def test_copies_in_shared_memory_count_where_files_lie_in_it(monkeypatch, seed):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    monkeypatch.setattr("tempfile.tempdir", None)
    found = exercise.of(load_without_double_memory)
    reference = source.definition(found.source, found.name)
    verdicts = []
    with Engine(zygote=Zygote(in_jail=False)) as engine:  # in the jail there is no shared memory
        expected = engine.expected(found, seed)
        for copies in (0, 2):
            text = COPIES_INTO_SHARED_MEMORY.format(copies=copies, reference=reference)
            answer = Answer(found.name, (("cell", text),), own="cell")
            verdicts.append(judging.judge(engine, found, answer, seed, expected, naming=False))
    assert {verdict.verdict for verdict in verdicts} == {"right"}, [verdict.reason for verdict in verdicts]
    assert [round(verdict.points / found.points, 2) for verdict in verdicts] == [1.0, 0.67]


def test_logits_equal_those_of_transformers_from_pretrained(tmp_path, seed):
    transformers = peer("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)

    def build() -> nn.Module:
        model = transformers.LlamaForCausalLM(config)
        rotary = model.model.rotary_emb
        rotary.reset_buffers = lambda: rotary.__init__(config)
        return model

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_without_double_memory(build, str(tmp_path / "model.safetensors")).eval()
    tokens = torch.arange(10)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight

import ast
import shlex
from dataclasses import replace

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.loading import snippets


def test_every_python_snippet_is_valid_whatever_the_folder_is_called(report: RunReport) -> None:
    for export in report.exports:
        odd = replace(export, path='runs/a "b" $(c)/\\d')
        python, *shell = snippets(odd, quantized_base="runs/e 'f'")
        assert odd.path in [node.value for node in ast.walk(ast.parse(python.text)) if isinstance(node, ast.Constant)]
        for command in shell:
            assert shlex.split(command.text) == ["vllm", "serve", odd.path]


def test_the_adapter_is_loaded_onto_its_quantized_base(report: RunReport) -> None:
    adapter = next(export for export in report.exports if export.format == "peft_adapter")
    (snippet,) = snippets(adapter, quantized_base="runs/base")
    assert snippet.title == "PEFT"
    assert 'base = "runs/base"' in snippet.text


def test_vllm_is_named_only_for_formats_that_it_documents(report: RunReport) -> None:
    served = {export.format for export in report.exports if len(snippets(export, quantized_base="base")) == 2}
    assert served == {
        "bitsandbytes_nf4",
        "compressed_tensors_w4a16_g32",
        "compressed_tensors_w4a16_g128",
        "compressed_tensors_w8a16",
    }


def test_a_gguf_file_is_named_and_opened_by_llama_cpp(report: RunReport) -> None:
    odd = replace(
        report.exports[0], format="gguf_q4_0", path="runs/a 'b'", sha256={"config.json": "00", "model-q4_0.gguf": "01"}
    )
    python, shell = snippets(odd, quantized_base="base")
    constants = [node.value for node in ast.walk(ast.parse(python.text)) if isinstance(node, ast.Constant)]
    assert constants == ["runs/a 'b'/model-q4_0.gguf"]
    assert shlex.split(shell.text) == ["llama-server", "--model", "runs/a 'b'/model-q4_0.gguf"]


def test_a_gguf_adapter_is_put_beside_a_base(report: RunReport) -> None:
    adapter = replace(report.exports[0], format="gguf_adapter", path="runs/x", sha256={"adapter.gguf": "01"})
    snippet, server = snippets(adapter, quantized_base="base")
    ast.parse(snippet.text)
    assert shlex.split(server.text) == ["llama-server", "--model", "base.gguf", "--lora", "runs/x/adapter.gguf"]
    assert 'Llama(model_path=base, lora_path="runs/x/adapter.gguf")' in snippet.text


def test_a_gptq_file_names_the_packages_that_it_needs(report: RunReport) -> None:
    gptq = replace(report.exports[0], format="gptq_w4_g64")
    transformers, vllm = snippets(gptq, quantized_base="base")
    assert transformers.title == "transformers (needs: pip install gptqmodel optimum)"
    assert vllm.text.startswith("vllm serve")


@pytest.mark.parametrize(("rank", "room"), [(1, "1"), (5, "8"), (16, "16"), (100, "128")])
def test_vllm_serves_an_adapter_beside_its_base_with_room_for_its_rank(report: RunReport, rank: int, room: str) -> None:
    adapter = replace(report.exports[0], path="runs/a 'b'")
    _, server = snippets(adapter, quantized_base="runs/base", served_rank=rank)
    flags = ["--enable-lora", "--max-lora-rank", room, "--lora-modules", "adapter=runs/a 'b'"]
    assert shlex.split(server.text) == ["vllm", "serve", "runs/base", *flags]


def test_a_rank_that_vllm_has_no_room_for_is_not_served(report: RunReport) -> None:
    assert len(snippets(report.exports[0], quantized_base="runs/base", served_rank=600)) == 1

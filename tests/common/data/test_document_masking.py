"""Document masking: a packed row gives what each of its documents gives alone."""

import pytest
import torch

from recipes.common.data.document_masking import document_positions, masking_problem


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_documents_do_not_see_each_other(attention):
    """One packed row gives the logits that each document gives alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lengths = [5, 1, 1, 9, 16]
    documents = [torch.cat([torch.randint(3, 64, (length - 1,)), torch.tensor([2])]) for length in lengths]
    tokens = torch.stack([torch.cat(documents), torch.cat(documents[::-1])])
    positions = document_positions(tokens, 2)
    assert positions[0].tolist() == [i for length in lengths for i in range(length)]
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    for row, order in enumerate((documents, documents[::-1])):
        alone = [model(input_ids=document[None], use_cache=False).logits[0] for document in order]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_attention_that_cannot_mask_is_refused_by_name():
    assert masking_problem("sdpa", 8) is None and masking_problem("flash_attention_2", 1) is None
    assert "attention=paged cannot keep documents apart" in masking_problem("paged", 1)
    assert "batch.micro_seqs=2: attention=flash_attention_2" in masking_problem("flash_attention_2", 2)

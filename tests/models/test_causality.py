import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from trimfit.errors import InputError
from trimfit.models import check_causal

WINDOW = torch.tensor([3, 1, 4, 1, 5, 9])


def bert(is_decoder: bool) -> BertLMHeadModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config.is_decoder = is_decoder
    return BertLMHeadModel(config)


def test_an_encoder_under_the_name_of_a_decoder_is_refused():
    model = bert(is_decoder=False).train()
    with pytest.raises(InputError, match="BertLMHeadModel looks at tokens to the right, so it is an encoder"):
        check_causal(model, WINDOW)
    assert model.training


def test_decoders_pass():
    check_causal(bert(is_decoder=True), WINDOW)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    check_causal(LlamaForCausalLM(config), WINDOW)
    check_causal(LlamaForCausalLM(config), WINDOW[:1])

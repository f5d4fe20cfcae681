"""Model families that are known and not computed here, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_WORDS = {
    "a mixture of experts": (
        "mixtral qwen2_moe qwen3_moe qwen3_5_moe qwen3_5_moe_text deepseek deepseek_v2 deepseek_v3 deepseek_v32 dbrx "
        "olmoe flex_olmo phimoe granitemoe granitemoeshared gpt_oss llama4 llama4_text jetmoe glm4_moe glm4_moe_lite "
        "glm_moe_dsa ernie4_5_moe hunyuan_v1_moe dots1 minimax minimax_m2 longcat_flash exaone_moe cohere2_moe "
        "lfm2_moe switch_transformers nllb-moe grok-1 bailing_moe kimi_k2 arctic"),
    "recurrent or convolution layers": (
        "mamba mamba2 falcon_mamba jamba bamba zamba zamba2 rwkv recurrent_gemma qwen3_next falcon_h1 nemotron_h "
        "granitemoehybrid lfm2 xlstm kimi_linear olmo_hybrid"),
    "a part for images or sound": (
        "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen2_audio qwen2_5_omni mllama "
        "gemma3 gemma3n mistral3 paligemma idefics idefics2 idefics3 internvl smolvlm phi4_multimodal pixtral "
        "chameleon whisper voxtral fuyu blip-2 git aria glm4v"),
    "an encoder": (
        "bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 modernbert camembert mpnet t5 mt5 umt5 "
        "t5gemma bart mbart pegasus marian m2m_100 led bigbird_pegasus prophetnet longt5"),
    "": (
        "gemma gemma2 gemma3_text gemma3n_text gemma4 gemma4_text vaultgemma cohere cohere2 olmo olmo2 olmo3 granite "
        "nemotron exaone exaone4 glm glm4 minicpm minicpm3 starcoder2 arcee apertus smollm3 helium ministral "
        "ministral3 diffllama bitnet phi phi3 falcon gpt_neo gpt_neox gpt_neox_japanese gptj gpt_bigcode openai-gpt "
        "opt bloom mpt codegen stablelm persimmon xglm biogpt ctrl xlnet chatglm baichuan internlm internlm2 internlm3 "
        "qwen qwen3_5 qwen3_5_text xverse aquila ernie4_5 hunyuan_v1_dense seed_oss nanochat"),
}

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {kind: why for why, kinds in _WORDS.items() for kind in kinds.split()})
"""`model_type` -> what above all Triax does not compute of it; empty where it is many small things."""

"""One frozen base, many LoRA adapters: the single model-loading helper of the project.

Every role of PIT (policy, PIT model, reward models, judge) is a small LoRA adapter on the same
base, which is loaded once (in 4-bit by default). A reward model also has a scalar head: one
nn.Linear on the last hidden states.

                        head (D -> 1)               LM head (D -> V)
                             ^                            ^
    ids (B, L) -> [ base in 4-bit + the active adapter ] -> hidden (B, L, D)

Shapes are those of tokens.py: B batch, P prompt, R response, L = P + R, V vocabulary, D hidden
size.
"""

import copy
import logging
import warnings
from functools import cache
from itertools import takewhile
from pathlib import Path

# Notices that the libraries print at each start and nobody can act on: an optional kernel is
# missing, a method was renamed. Set before the imports, since importing peft imports
# bitsandbytes.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

import torch
import torch.nn.functional as F
from huggingface_hub.utils import enable_progress_bars
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from data import max_length, talk
from errors import UserError, explained
from tokens import Tokens, mask_after_eos, micro_batches, one_row

# cuDNN's attention gives NaN with masks on H100 and B200 (pytorch issues 196678 and 193893)
torch.backends.cuda.enable_cudnn_sdp(False)
# without a network, huggingface_hub reports every single retry
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # of loading; downloads show theirs
enable_progress_bars()

TINY = Path(__file__).parent / "tiny"  # the built-in base, made by tools/make_tiny.py
PUBLISHERS = {  # who publishes a model, by how its name begins
    "Qwen": "Qwen",
    "SmolLM": "HuggingFaceTB",
    "Llama": "meta-llama",
    "gemma": "google",
}
HOW_TO_GET = (
    "Give a local folder, or fetch it where there is a network (hf download {}; if it is gated, "
    "accept its terms and hf auth login), or use --model tiny (built in)."
)
# the chat template of models that have none; a tokenizer without a BOS leaves it out
PLAIN_DIALOGUE = """{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}:
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}Assistant:
{% endif %}"""
# Put before every chat template: with today's date in prompts (Llama 3.2), tomorrow's would
# differ; and a model that thinks before it answers (Qwen3) is told to answer directly.
STEADY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}{% set enable_thinking = false %}"
SAMPLE_CHAT = talk([{"role": "user", "content": "one"}], "two", "three")
# model types in which two candidates can share a row: they obey any attention mask (tested)
SHARED_ROW = "gemma gpt2 gpt_neox llama olmo olmo2 phi qwen2 qwen3".split()
# prompt tokens that `generate` reads at a time: same states, a fraction of the memory
PREFILL = 128
SAMPLED = 32_768  # tokens in memory while `answer` writes, prompts included
LOGIT_CHUNK = 256  # tokens whose (n, V) logits exist at a time; 256 x 152k in fp32 is 150 MiB


class LM:
    """A frozen base with named adapters. One is active at a time: `activate` it before each use."""

    def __init__(self, base, tokenizer, lora):
        """base: a causal LM of transformers; lora: the LoraConfig of all adapters."""
        self.tokenizer = tokenizer
        self.lora = lora
        self.device = base.device
        self.base = base
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_DIALOGUE
        # of several templates, the default one
        tokenizer.chat_template = STEADY + tokenizer.get_chat_template()
        self.control = control_tokens(tokenizer)
        self.eos = end_of_turn(tokenizer)
        rows = base.get_output_embeddings().weight  # (V, D)
        # one that is missing, or has no row, is left to `check_base`
        if self.eos in range(len(rows)) and is_unlearned(self.eos, rows):
            self.eos = tokenizer.eos_token_id
        # Masks hide padding, so any token will do but EOS: with that, padding would look like the
        # end of an answer, and a mask made by `ids != pad` would hide the EOS. The model would
        # never learn to stop.
        self.pad = 1 if self.eos == 0 else 0
        self.size = base.num_parameters()
        shape = base.config.get_text_config()
        is_windowed = getattr(shape, "sliding_window", None)  # our own mask would override it
        self.shared_row = shape.model_type in SHARED_ROW and not is_windowed
        self.backbone = base.get_decoder()
        self.hidden_size = base.get_input_embeddings().embedding_dim
        # "blank" is the base itself: the B of a new LoRA is zero
        self.peft = get_peft_model(base, lora, adapter_name="blank")
        if not isinstance(lora.target_modules, str):  # peft made it a set, which has no order
            lora.target_modules = sorted(lora.target_modules)
        self.lm_head = base.get_output_embeddings()
        self.heads = nn.ModuleDict()
        self.roles = self.peft.peft_config.keys()  # a view: peft knows its adapters

    def describe(self):
        """The base in one line."""
        kind = str(self.base.dtype).removeprefix("torch.")
        if getattr(self.base, "is_loaded_in_4bit", False):
            kind = f"4-bit and {kind}"
        size = f"{self.size / 1e6:.1f}M parameters"
        end = self.tokenizer.decode([self.eos])
        return f"{size} in {kind} on {self.device.type}, LoRA r={self.lora.r}, EOS {end}"

    def checkpoint_layers(self):
        """Keep only each layer's input for the backward pass and recompute the rest: 1/3 slower."""
        self.base.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- adapters ------------------------------------------------------------------------------

    def add(self, role, like="blank", head=False):
        """Add adapter `role` with the weights of `like`; with `head`, a scalar head as well.

        The head is a copy of `like`'s where that has one, else a new one.
        """
        self.peft.add_adapter(role, self.lora)
        self.set_weights(role, self.weights(like))
        if head and like in self.heads:
            self.heads[role] = copy.deepcopy(self.heads[like])
        elif head:
            self.heads[role] = new_head(self.hidden_size, self.device)

    def weights(self, role):
        """LoRA's A and B of `role` in all layers, by their names in a file of PEFT's."""
        return get_peft_model_state_dict(self.peft, adapter_name=role, save_embedding_layers=False)

    def set_weights(self, role, weights):
        """Copy weights such as `weights` gives into `role`."""
        if weights.keys() != self.weights(role).keys():  # peft would silently skip them
            raise ValueError("its weights belong to other layers")
        set_peft_model_state_dict(self.peft, weights, adapter_name=role)

    def activate(self, role, train=False):
        """Compute with `role` from now on. Only with `train` do its parameters require gradients.

        All adapters share one set of layers: a forward pass and its backward pass must see the same
        active adapter.
        """
        self.peft.set_adapter(role, inference_mode=not train)
        # Dropout is 0 everywhere, so eval mode loses nothing, and sampling in training mode is
        # wrong under checkpointing. But checkpointing itself asks for `training` of each layer
        # (not of the modules inside, which stay in eval mode).
        self.peft.eval()
        for layer in self.peft.modules():
            if getattr(layer, "gradient_checkpointing", False):
                layer.training = train
        for name, head in self.heads.items():
            head.requires_grad_(train and name == role)

    def parameters(self, role):
        """The trainable tensors of `role`: LoRA's A and B, and its head where it has one."""
        self.activate(role, train=True)
        return [p for p in [*self.peft.parameters(), *self.heads.parameters()] if p.requires_grad]

    def save(self, role, folder):
        """Write `role` to the Path `folder` as standard PEFT, and its head to head.safetensors."""
        self.peft.peft_config[role].save_pretrained(folder)
        (folder / "adapter_model.safetensors").write_bytes(save(self.weights(role)))
        if role in self.heads:
            (folder / "head.safetensors").write_bytes(save(self.heads[role].state_dict()))

    def load(self, role, folder):
        """Add `role` as `save` wrote it to the Path `folder`. Never opens a pickle."""
        head = folder / "head.safetensors"
        self.add(role, head=head.exists())
        self.set_weights(role, load_file(folder / "adapter_model.safetensors"))
        if head.exists():
            self.heads[role].load_state_dict(load_file(head))

    # ---- text to tokens ------------------------------------------------------------------------

    def encode_prompt(self, messages):
        """Chat messages -> token ids, up to the point where the assistant starts to write."""
        messages = [m | {"content": self.escape(m["content"]).strip()} for m in messages]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            is_shown = system in text
        except TemplateError:
            if not system:
                raise
            is_shown = False
        # some templates refuse or ignore system messages: then the user says it
        if not is_shown:
            user = f"{system}\n\n{messages[1]['content']}"
            return self.encode_prompt([{"role": "user", "content": user}, *messages[2:]])
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_response(self, text):
        """An answer -> token ids, with EOS at the end."""
        text = self.escape(text).strip()
        return self.tokenizer.encode(text, add_special_tokens=False) + [self.eos]

    def escape(self, text):
        """Break up control tokens such as `<|im_end|>` in typed text, so that they stay text."""
        for token in self.control:
            text = text.replace(token, token[:1] + " " + token[1:])
        return text

    def decode(self, responses):
        """(B, R) token ids -> answers as text. EOS and what follows is dropped."""
        ends = {self.eos, self.tokenizer.eos_token_id}  # an untrained base may use its own
        rows = responses.tolist()
        rows = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def collate(self, prompts, responses):
        """Lists of token ids -> Tokens, padded as drawn in tokens.py."""
        # padding is -1 until the masks are made: `ids != pad` would also hide a pad token that is
        # part of a text
        responses = self.pad_rows(responses, -1)
        ids = torch.cat([self.pad_rows(prompts, -1, "left"), responses], 1)
        mask = (ids >= 0).long()
        return Tokens(ids.masked_fill(ids < 0, self.pad), mask, (responses >= 0).long())

    def pad_rows(self, rows, value, side="right"):
        """Lists of ints -> (B, the length of the longest), padded with `value`."""
        rows = [torch.tensor(row, dtype=torch.long) for row in rows]
        padded = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
        return padded.to(self.device)

    # ---- forward passes with the active adapter ------------------------------------------------

    def hidden(self, tokens):
        """Last hidden states from the last prompt token on: (B, R + 1, D).

        State t has seen t response tokens.
        """
        # positions count real tokens only, so that left padding changes nothing
        positions = (tokens.mask.cumsum(1) - 1).clamp(min=0)
        out = self.backbone(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            position_ids=positions,
            use_cache=False,
        )
        R = tokens.response_mask.shape[1]
        return out.last_hidden_state[:, -R - 1 :]

    def logprobs(self, tokens, temperature=1.0):
        """log pi(token | everything before it) of each response token: (B, R), 0 after EOS.

        The LM head sees response positions only, a chunk at a time, and the backward pass
        recomputes its logits: the full (B, L, V) tensor, by far the largest of all, never exists.
        """
        real = tokens.response_mask.bool()  # (B, R)
        states = self.hidden(tokens)[:, :-1][real]  # (N, D), N real response tokens
        targets = tokens.responses[real]  # (N,)
        chosen = [
            checkpoint(token_logprobs, self.lm_head, h, y, temperature, use_reentrant=False)
            for h, y in zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))
        ]
        empty = torch.zeros(real.shape, device=self.device)
        return empty.masked_scatter(real, torch.cat(chosen))

    def scores(self, tokens):
        """What the active reward model says of each response: (B,)."""
        return self.scores_from_states(tokens, self.hidden(tokens))

    def scores_from_states(self, tokens, states):
        """The active role's scalar head at the last real token of states (B, R + 1, D): (B,)."""
        last = tokens.response_mask.sum(1, keepdim=True)  # state n has seen all n tokens
        return self.scores_at(states, last).squeeze(1)

    def scores_at(self, states, places):
        """The active role's scalar head at k places, (B, k), in each row of states: (B, k)."""
        states = states.take_along_dim(places[:, :, None], 1)  # (B, k, D)
        return self.heads[self.peft.active_adapter](states.float()).squeeze(-1)

    def scores_of_candidates(self, prompts, candidates):
        """The scores of k responses to each prompt by the active reward model: (B, k).

        prompts: B lists of token ids; candidates: B lists of k lists. Where the model allows it,
        all candidates share one row, so that their prompt is read only once (tokens.one_row).
        """
        if not self.shared_row:
            one_by_one = [self.scores(self.collate(prompts, kth)) for kth in zip(*candidates)]
            return torch.stack(one_by_one, 1)
        ids, part, ends = zip(*map(one_row, prompts, candidates))
        part = self.pad_rows(part, -1)
        # a token sees the prompt (part 0) and its own part, up to itself
        query = part[:, :, None]
        key = part[:, None, :]
        sees = ((key == 0) | (key == query)).tril()  # (B, L, L)
        out = self.backbone(
            input_ids=self.pad_rows(ids, self.pad),
            attention_mask=sees[:, None],
            position_ids=sees.sum(2) - 1,  # how many tokens it sees before itself
            use_cache=False,
        )
        return self.scores_at(out.last_hidden_state, self.pad_rows(ends, 0))

    # ---- writing -------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, role, prompts, max_tokens, temperature=1.0):
        """Sample a response to each prompt (token ids) from the whole distribution -> Tokens.

        Temperature 0 takes the likeliest token.
        """
        self.activate(role)
        start = self.collate(prompts, [[]] * len(prompts))  # (B, P)
        # no top-k or top-p cut: the samples must come from the policy whose log-probs are computed
        out = self.peft.generate(
            input_ids=start.ids,
            attention_mask=start.mask,
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=max(temperature, 1e-6),  # greedy decoding ignores it, but 0 is refused
            top_k=0,
            top_p=1.0,
            prefill_chunk_size=PREFILL,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
        )  # (B, P + R)
        response_mask = mask_after_eos(out[:, start.ids.shape[1] :], self.eos)
        return Tokens(out, torch.cat([start.mask, response_mask], 1), response_mask)

    def answer(self, role, chats, cfg, temperature=1.0):
        """One text by `role`, a policy or a PIT model, for each chat (messages) -> texts."""
        texts = []
        for part in micro_batches(chats, rows_at_a_time(cfg)):
            prompts = [self.encode_prompt(chat) for chat in part]
            written = self.generate(role, prompts, cfg.max_response, temperature)
            texts += self.decode(written.responses)
        return texts


def rows_at_a_time(cfg):
    """How many texts are written at a time: one to four of PPO's batches, as SAMPLED allows."""
    return max(cfg.rl_batch, min(SAMPLED // max_length(cfg), 4 * cfg.rl_batch))


# ---- one optimiser step, used by every training loop -------------------------------------------


def adamw(parameters, lr, eps=1e-8):
    return torch.optim.AdamW(parameters, lr=lr, eps=eps, weight_decay=0.0)


def take_step(optimizer, lr):
    """One optimiser step on the gradients gathered so far -> their norm before clipping, scalar.

    They are clipped to a norm of 1, as in GPT-3 and in transformers' Trainer.
    """
    (group,) = optimizer.param_groups
    norm = nn.utils.clip_grad_norm_(group["params"], max_norm=1.0)
    group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def token_logprobs(lm_head, states, targets, temperature):
    """(N, D) states, (N,) token ids -> (N,) log-probabilities at the temperature."""
    logits = lm_head(states.to(lm_head.weight.dtype)).float()  # (N, V)
    return -F.cross_entropy(logits / temperature, targets, reduction="none")


def new_head(hidden_size, device):
    """A scalar head with outputs of about unit variance on normalised states.

    The standard deviation 1 / sqrt(D + 1) is that of Stiennon et al. (2020).
    """
    head = zero_head(hidden_size, device)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head


def zero_head(hidden_size, device):
    """A scalar head that gives 0 for everything until it is trained: PPO's critic."""
    head = nn.Linear(hidden_size, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


# ---- what the tokenizer says -------------------------------------------------------------------


def end_of_turn(tokenizer):
    """The id of the token that ends an answer.

    That is what the chat template writes after an answer, else the tokenizer's EOS. Qwen2's base
    model is why: its EOS, <|endoftext|>, is also its padding, while its template ends turns in
    <|im_end|>.
    """
    turns = talk([{"role": "user", "content": "Q"}], "ANSWER")
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
    ids = tokenizer.encode(after, add_special_tokens=False)
    # not `all_special_ids`, where those of Gemma 3 and Phi-3 are missing
    added = tokenizer.added_tokens_decoder
    if ids and ids[0] in added and added[ids[0]].special:
        return ids[0]
    return tokenizer.eos_token_id


def is_unlearned(token, rows):
    """Whether a base has never seen `token`, by the rows of its LM head (V, D).

    The chat template of a base model may use tokens that never occurred in its training. Their rows
    stay together: in SmolLM2 they are within 0.3% of each other, while that of <|im_end|>, which it
    knows, is 13% away. No token of k with equal rows can get a probability above 1/k, and LoRA does
    not train the rows.
    """
    distances = (rows - rows[token]).norm(dim=1)  # (V,)
    alike = distances < 0.02 * rows[token].norm()
    return alike.sum() > 8  # the token itself, and at least eight others


def control_tokens(tokenizer):
    """The tokens that give a chat its structure: special ones, and the template's turn markers."""
    found = []
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        if token.special or (text.strip() and text in tokenizer.chat_template):
            found.append(text)
    return sorted(found)


# ---- loading -----------------------------------------------------------------------------------


def find_model(name):
    """What a name stands for -> folder or hub id.

    "tiny", a local folder, a hub id or its page, or a short name such as "Qwen2-0.5B".
    """
    name = name.removeprefix("https://huggingface.co/")
    if name == "tiny":
        return TINY
    for start, publisher in PUBLISHERS.items():
        if name.startswith(start) and "/" not in name and not Path(name).exists():
            return f"{publisher}/{name}"
    return name


@cache  # `all` checks before it reads any data, load_model again
def check_model(name):
    """Its folder or hub id; UserError unless `name` is a base with a config and a tokenizer."""
    source = find_model(name)
    folder = Path(source)
    if (folder / "adapters").is_dir():
        raise UserError(f"--model {name} is a run, not a model. To continue it: --run {name}")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--model {name} is a PEFT adapter. Give its base, or merge the two first: "
            "peft's merge_and_unload, or export --merge."
        )
    if not folder.exists():
        if name.startswith((".", "/", "~")):
            raise UserError(f"--model {name}: there is no such folder.")
        print(f"{source}: looking in the download cache, then on the hub", flush=True)
        print("  (without a network, HF_HUB_OFFLINE=1 saves a minute or two)", flush=True)
    with explained(f"Cannot load the model {name!r}", HOW_TO_GET.format(source)):
        AutoConfig.from_pretrained(source, trust_remote_code=False)
        load_tokenizer(source)
    return source


def load_model(name="tiny", bits=4, lora_r=16, lora_alpha=32, target_modules="all-linear", seed=0):
    """Load a base, freeze it, and wrap it for adapters -> LM.

    name: see find_model. bits: 4 (NF4 through bitsandbytes) or 16 (not quantised: bf16, or fp32
    where there is no bf16). The built-in base is in fp32 on every CPU.
    Raises UserError, in one or two lines, when there is no such model.
    Never runs code from a hub, never opens a pickle.
    """
    source = check_model(name)
    failed = f"Cannot load the model {name!r}"
    # 1. its files
    with explained(failed, HOW_TO_GET.format(source)):
        tokenizer = load_tokenizer(source)
        base = load_frozen(source, bits)
    advice = f"Does --target-modules {target_modules} match its layers? Is its chat template valid?"
    # 2. the adapters' layers
    with explained(failed, advice):
        lora = LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        # LoRA's A is drawn here, once, for "blank": every role starts from the same one
        torch.manual_seed(seed)
        lm = LM(base, tokenizer, lora)
    # 3. does it do what training relies on?
    with explained(failed, "PIT cannot train such a model: give another --model."):
        check_base(lm)
    return lm


def load_tokenizer(source):
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # transformers makes up an empty tokenizer where the files are missing
    if "say it" not in tokenizer.decode(tokenizer.encode("Say it")).lower():
        raise ValueError("the files of its tokenizer are missing or damaged.")
    return tokenizer


def best_device():
    """The device to run on, and the dtype to compute in there.

    fp16's range is too small for gradients that are not rescaled: without bf16, all is in fp32.
    """
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "cuda", torch.bfloat16 if has_bf16 else torch.float32
    if torch.backends.mps.is_available():
        return "mps", torch.float32
    # a CPU that multiplies in bf16 trains in it three times as fast
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "cpu", torch.bfloat16 if has_bf16 else torch.float32


def load_frozen(source, bits):
    """A base on the best device there is, frozen."""
    device, dtype = best_device()
    if source == TINY and device == "cpu":
        dtype = torch.float32  # the built-in base computes alike on all CPUs
    quantization = None
    if bits == 4 and device == "mps":
        print("4-bit is not used on mps: the base stays unquantised, as with --bits 16.")
    elif bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=quantization,
        output_loading_info=True,
    )
    # transformers would fill them with random numbers
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} tensors, such as {missing[0]}.")
    base.requires_grad_(False)
    # the model's own penalties and cutoffs would affect samples, but not log-probs
    base.generation_config = GenerationConfig()
    # bitsandbytes' AVX512 layout for CPUs has no backward, yet returns gradients: wrong ones
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


@torch.no_grad()
def check_base(lm):
    """Raise ValueError for a base on which training would fail, or silently go wrong."""
    shown = lm.tokenizer.decode(lm.encode_prompt(SAMPLE_CHAT))
    if not all(turn["content"] in shown for turn in SAMPLE_CHAT):
        raise ValueError("its chat template does not show all turns of a conversation.")
    known = len(lm.tokenizer)
    rows = lm.peft.get_input_embeddings().num_embeddings
    if known > rows:
        raise ValueError(f"its tokenizer has {known} tokens, its embedding only {rows}.")
    if lm.eos is None:
        raise ValueError("its tokenizer has no end-of-sequence token.")
    # Log-probs of six tokens as in sampling, after all that the model does to its logits: the
    # likeliest three, since a cap changes large logits most, and three others
    prompt = [9, 5]
    logits = lm.peft(input_ids=torch.tensor([prompt], device=lm.device)).logits[0, -1]
    six = [*logits.topk(3).indices.tolist(), 6, 7, 8]
    sampled = logits.float().log_softmax(-1)[six]
    # The same as in training, with later tokens after them. A seventh row, whose prompt is longer,
    # puts padding before the six.
    prompts = [prompt] * 6 + [[5, 6, 7]]
    answers = [[token, 9, 5] for token in (*six, 9)]
    ours = lm.logprobs(lm.collate(prompts, answers))[:6, 0]
    # room for bf16, where logits of 40 are 0.25 apart; NaN is close to nothing
    if not torch.allclose(ours, sampled, rtol=0.02, atol=0.4):
        raise ValueError(
            "the log-probs of its tokens depend on padding, on later tokens, or on something "
            "that it does to its logits at the end."
        )


# ---- for other programs ------------------------------------------------------------------------


def export(lm, role, folder, merge):
    """Write `role` for plain peft, or merged for plain transformers.

    Merging consumes this LM, which must be unquantised: merging into 4-bit weights would shift the
    logits. The merged weights are in the base's dtype, so in bf16 they are rounded, too.
    """
    tokenizer = lm.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(lm.eos)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    if not merge:
        lm.save(role, folder)
        return
    model = lm.peft.merge_and_unload(adapter_names=[role])
    model.generation_config = GenerationConfig(
        eos_token_id=lm.eos, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)

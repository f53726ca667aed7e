"""One frozen base, many LoRA adapters: the single model-loading helper of the project.

Every role of PIT (policy, PIT model, reward models, judge) is one small LoRA adapter on the same base, which is
loaded once, in 4-bit. A reward model has a scalar head besides: one nn.Linear that reads the last hidden states.

                      head (D -> 1)                  LM head (D -> V)
                           ^                               ^
    ids (B, L) -> [ base in 4-bit + the active adapter ] -> hidden (B, L, D)

Shapes are those of tokens.py: B batch, P prompt tokens, R response tokens, L = P + R, V vocabulary, D hidden size.
"""

import copy
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

# Said by the libraries at each start, and nothing to act on: an optional kernel is missing, a method was renamed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # set here, since importing peft imports bitsandbytes
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from errors import UserError, finite, first_line, out_of_memory
from tokens import Tokens, mask_after_eos, one_row_each

torch.backends.cuda.enable_cudnn_sdp(False)  # with masks, NaN on H100 and B200: pytorch issues 196678 and 193893
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it tries for some time, and tells of each try
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

TINY = Path(__file__).parent / "tiny"  # the built-in base, made by make_tiny.py
HUB = {"Qwen": "Qwen", "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "gemma": "google", "OLMo": "allenai",
       "pythia": "EleutherAI", "TinyLlama": "TinyLlama"}  # who publishes a model, by how its name begins  # fmt: skip
PREFILL = 128  # tokens of each prompt that `generate` reads at one time: the same states, with memory for no more
ONE_ROW = "gemma gpt2 gpt_neox llama olmo olmo2 phi qwen2 qwen3".split()  # model types that obey any mask: tested
LOGIT_CHUNK = 256  # tokens whose (n, V) logits exist at one time; 256 x 152k in fp32 is 150 MiB


class LM:
    """A frozen base with named adapters. One adapter is active at a time; `activate` it before each use."""

    def __init__(self, base, tokenizer, lora):
        self.tokenizer, self.lora, self.device = tokenizer, lora, base.device
        self.eos = end_of_turn(tokenizer)
        pads = tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1  # any will do: masks hide it
        self.pad = next(token for token in pads if token not in (None, self.eos))
        added, template = tokenizer.added_tokens_decoder.values(), tokenizer.chat_template or ""
        markers = {token.content for token in added if token.special or token.content.strip() and token.content in template}
        self.control = sorted(markers | set(tokenizer.all_special_tokens))
        self.one_row = base.config.model_type in ONE_ROW and not getattr(base.config, "sliding_window", None)
        self.trunk, self.hidden_size = base.get_decoder(), base.get_input_embeddings().embedding_dim
        self.peft = get_peft_model(base, copy.deepcopy(lora), adapter_name="blank", autocast_adapter_dtype=True)
        self.lm_head = base.get_output_embeddings()
        self.heads = nn.ModuleDict()
        self.roles = {"blank"}  # the base itself: a new LoRA's B is zero

    def describe(self):
        """The base in one line."""
        base = self.peft.get_base_model()
        size = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for n, p in base.named_parameters() if "lora" not in n)
        kind = "4-bit" if any(p.dtype == torch.uint8 for p in base.parameters()) else str(self.lm_head.weight.dtype)[6:]
        return f"{size / 1e6:.1f}M parameters in {kind} on {self.device.type}, LoRA r={self.lora.r}"

    def checkpoint_layers(self):
        """Keep only the input of each layer for the backward pass, and compute the rest again: a third more time."""
        self.peft.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    # ---- adapters ------------------------------------------------------------------------------------------------

    def add(self, role, like="blank", head=False):
        """A new adapter with the weights of `like`; with `head`, also a scalar head: `like`'s own where it has one."""
        if role not in self.roles:
            self.peft.add_adapter(role, copy.deepcopy(self.lora))
            self.roles.add(role)
        weights = get_peft_model_state_dict(self.peft, adapter_name=like, save_embedding_layers=False)
        set_peft_model_state_dict(self.peft, {k: v.clone() for k, v in weights.items()}, adapter_name=role)
        if head and like in self.heads:
            self.heads[role] = copy.deepcopy(self.heads[like])
        elif head:
            self.heads[role] = new_head(self.hidden_size, self.device)

    def activate(self, role, train=False):
        """Compute with `role` from here on. Only with `train` do its parameters, and no others, require gradients.

        All adapters share one set of layers: a forward and its backward must see the same active adapter.
        """
        self.peft.set_adapter(role, inference_mode=not train)
        self.peft.eval()  # dropout is 0 everywhere, so nothing is lost, and sampling never meets a training mode
        for layer in self.peft.modules():  # checkpointing asks for layer.training; the modules inside stay in eval mode
            if getattr(layer, "gradient_checkpointing", False):
                layer.training = train
        for name, head in self.heads.items():
            head.requires_grad_(train and name == role)

    def parameters(self, role):
        """The trainable tensors of `role`: LoRA's A and B, and its head where it has one."""
        self.activate(role, train=True)
        return [p for p in [*self.peft.parameters(), *self.heads.parameters()] if p.requires_grad]

    def save(self, role, folder):
        """Write `role` to the Path `folder`, as standard PEFT, with head.safetensors beside it where it has a head."""
        config = copy.deepcopy(self.peft.peft_config[role])
        config.inference_mode = True
        config.save_pretrained(folder)
        weights = get_peft_model_state_dict(self.peft, adapter_name=role, save_embedding_layers=False)
        (folder / "adapter_model.safetensors").write_bytes(save({k: v.contiguous() for k, v in weights.items()}))
        if role in self.heads:
            (folder / "head.safetensors").write_bytes(save(self.heads[role].state_dict()))

    def load(self, role, folder):
        """Add `role` as `save` wrote it to the Path `folder`."""
        self.add(role, head=(folder / "head.safetensors").exists())
        set_peft_model_state_dict(self.peft, load_peft_weights(str(folder), device=str(self.device)), adapter_name=role)
        if role in self.heads:
            self.heads[role].load_state_dict(load_file(folder / "head.safetensors", device=str(self.device)))

    # ---- text to tokens ------------------------------------------------------------------------------------------

    def encode_prompt(self, messages):
        """Chat messages -> token ids, up to the point where the assistant starts to write."""
        messages = [{"role": m["role"], "content": self.plain(m["content"]).strip()} for m in messages]
        if not self.tokenizer.chat_template:
            text = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages) + "Assistant:"
            begin = [self.tokenizer.bos_token_id] if getattr(self.tokenizer, "add_bos_token", False) else []
            return begin + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            if messages[0]["role"] != "system":
                raise
            text = ""
        if messages[0]["role"] == "system" and messages[0]["content"] not in text:  # unknown to this template: the user says it
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self.encode_prompt([first, *messages[2:]])
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_response(self, text):
        """An answer -> token ids, EOS at the end."""
        space = "" if self.tokenizer.chat_template else " "  # "Assistant: text" in the plain dialogue form
        return self.tokenizer(space + self.plain(text).strip(), add_special_tokens=False)["input_ids"] + [self.eos]

    def plain(self, text):
        """Text typed by somebody must not act as a control token: break `<|im_end|>` up, and its like."""
        for token in self.control:
            text = text.replace(token, token[:1] + " " + token[1:])
        return text

    def decode(self, responses):
        """(B, R) token ids, or lists of ids -> answers as text. Everything from EOS on is dropped."""
        rows = [row.tolist() if torch.is_tensor(row) else row for row in responses]
        rows = [row[: row.index(self.eos)] if self.eos in row else row for row in rows]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def collate(self, prompts, responses):
        """Lists of token ids -> Tokens, padded as drawn in tokens.py. Masks come from lengths, never from `ids != pad`."""
        P, R = max(map(len, prompts)), max(map(len, responses))
        ids = [[self.pad] * (P - len(p)) + p + r + [self.pad] * (R - len(r)) for p, r in zip(prompts, responses)]
        mask = [[0] * (P - len(p)) + [1] * len(p + r) + [0] * (R - len(r)) for p, r in zip(prompts, responses)]
        mask = torch.tensor(mask, device=self.device)
        return Tokens(torch.tensor(ids, device=self.device), mask, mask[:, P:])

    # ---- forward passes with the active adapter --------------------------------------------------------------------

    def hidden(self, tokens):
        """Last hidden states from the last prompt token on: (B, R + 1, D). State t has seen t response tokens."""
        positions = (tokens.mask.cumsum(1) - 1).clamp(min=0)  # count real tokens only, so left padding changes nothing
        out = self.trunk(input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state[:, -tokens.response_mask.shape[1] - 1 :]

    def logprobs(self, tokens, temperature=1.0):
        """log pi(token | everything before it) of each response token: (B, R), 0 after EOS.

        The LM head sees response positions only, a chunk at a time, and its logits are recomputed in the backward pass:
        the full (B, L, V) tensor, the largest of all by far, never exists.
        """
        real = tokens.response_mask.bool()
        states, targets = self.hidden(tokens)[:, :-1][real], tokens.responses[real]  # (N, D), (N,)
        chunks = zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))
        chosen = [checkpoint(token_logprobs, self.lm_head, h, y, temperature, use_reentrant=False) for h, y in chunks]
        return torch.zeros(real.shape, device=self.device).masked_scatter(real, torch.cat(chosen))

    def scores(self, role, tokens, states=None):
        """A reward model's verdict: its scalar head at the last real token: (B,). states: `hidden`, if known."""
        states = self.hidden(tokens) if states is None else states
        last = tokens.response_mask.sum(1)  # state n has seen all n tokens
        states = states[torch.arange(len(last), device=self.device), last]  # (B, D)
        return self.heads[role](states.float()).squeeze(-1)

    def scores_of_candidates(self, role, prompts, candidates):
        """The same verdict on k responses to each prompt: (B, k). Where the model allows it, the prompt is read once."""
        if not self.one_row:
            return torch.stack([self.scores(role, self.collate(prompts, kth)) for kth in map(list, zip(*candidates))], 1)
        ids, part, position, ends = one_row_each(prompts, candidates)

        def pad(rows, value):
            longest = max(map(len, rows))
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=self.device)

        part = pad(part, -1)
        query, key = part[:, :, None], part[:, None, :]
        sees = ((key == 0) | (key == query)).tril()  # (B, L, L)
        dtype = self.lm_head.weight.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=self.device).masked_fill(~sees, torch.finfo(dtype).min)
        ids, positions = pad(ids, self.pad), pad(position, 0)
        out = self.trunk(input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False)
        rows = torch.arange(len(prompts), device=self.device)[:, None]
        states = out.last_hidden_state[rows, torch.tensor(ends, device=self.device)]  # (B, k, D)
        return self.heads[role](states.float()).squeeze(-1)

    @torch.no_grad()
    def generate(self, role, prompts, max_tokens, temperature=1.0):
        """Sample a response to each prompt (token ids), from the whole distribution -> Tokens. Temperature 0: the likeliest."""
        self.activate(role)
        start = self.collate(prompts, [[]] * len(prompts))  # (B, P)
        sampling = dict(do_sample=True, temperature=temperature) if temperature > 1e-6 else dict(do_sample=False)
        out = self.peft.generate(
            input_ids=start.ids, attention_mask=start.mask, max_new_tokens=max_tokens, top_k=0, top_p=1.0,
            prefill_chunk_size=PREFILL, pad_token_id=self.pad, eos_token_id=self.eos, **sampling,
        )  # fmt: skip
        response_mask = mask_after_eos(out[:, start.ids.shape[1] :], self.eos)
        return Tokens(out, torch.cat([start.mask, response_mask], 1), response_mask)


def adamw(parameters, lr, eps=1e-8):
    return torch.optim.AdamW(parameters, lr=lr, eps=eps, weight_decay=0.0)


def take_step(optimizer, lr, clip=1.0):
    """One optimiser step on the gradients gathered so far, their norm clipped -> the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite(grad_norm=norm)  # before it spoils the parameters
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def token_logprobs(lm_head, states, targets, temperature):
    """(N, D) states, (N,) token ids -> (N,) log-probabilities at the temperature."""
    logits = lm_head(states.to(lm_head.weight.dtype)).float()  # (N, V)
    if temperature != 1.0:  # a pass over (N, V) that most runs need not make
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


def new_head(hidden_size, device):
    """A scalar head with outputs of about unit variance on normalised states (Stiennon et al., 2020: std 1/sqrt(D + 1))."""
    head = nn.Linear(hidden_size, 1, device=device)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    nn.init.zeros_(head.bias)
    return head


def end_of_turn(tokenizer):
    """The id of the token that ends an answer: what the chat template writes after one, else the tokenizer's EOS.

    Qwen2's base model is why: its EOS is <|endoftext|>, which is also its padding, while its template ends turns in <|im_end|>.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        if first and first[0] in tokenizer.all_special_ids:
            return first[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token.")
    return tokenizer.eos_token_id


def find_model(name):
    """What a name stands for: "tiny", a local folder, a short name such as "Qwen2-0.5B", or a hub id -> folder or hub id."""
    publisher = next((publisher for start, publisher in HUB.items() if name.startswith(start)), None)
    if name == "tiny":
        return TINY
    return f"{publisher}/{name}" if publisher and "/" not in name and not Path(name).exists() else name


def load_model(name="tiny", bits=4, lora_r=16, lora_alpha=32, target_modules="all-linear", seed=0):
    """Load a base, freeze it, and wrap it for adapters.

    name: see find_model. bits: 4 (NF4 through bitsandbytes) or 16 (not quantised: bf16, or fp32 where there is no bf16).
    Raises UserError, in one or two lines, when there is no such model. Never runs code from a hub, never opens a pickle.
    """
    source = find_model(name)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # fp16 has too small a range for gradients that nobody scales: without bf16, everything is fp32
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = {}
    if bits == 4 and has_4bit(device):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device == "cpu" else dtype,
        )  # fmt: skip
    if not Path(source).exists():
        print(f"{source}: looking for it where downloads are kept, and on the hub", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if "say it" not in tokenizer.decode(tokenizer("Say it")["input_ids"]).lower():  # transformers makes up an empty one
            raise ValueError("the files of its tokenizer are missing or damaged.")
        options |= dict(dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(source, **options)
        changes = "final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale", "lm_head_multiplier"
        if any(getattr(base.config, name, None) for name in changes):
            raise ValueError("it changes its logits after the LM head, which the log-probs here do not know of.")
        base.requires_grad_(False)
        base.generation_config = GenerationConfig()  # the model's own penalties and cuts would be in samples, not in log-probs
        for module in base.modules():  # bitsandbytes' AVX512 layout for CPUs has no backward, yet gives gradients, wrong ones
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        torch.manual_seed(seed)  # LoRA's A is drawn once, for the blank adapter: every role starts from the same one
        lora = dict(r=lora_r, lora_alpha=lora_alpha, target_modules=target_modules, lora_dropout=0.0, task_type="CAUSAL_LM")
        lm = LM(base, tokenizer, LoraConfig(**lora))
        with torch.no_grad():  # the same tokens before another one, and with padding before them
            (a, b), (also_a, _), (also_b, _) = lm.hidden(lm.collate([[5, 6], [5, 6], [5, 6, 7]], [[7], [8], [9]]))
        if not (a - also_a).norm() + (b - also_b).norm() < 0.1 * b.norm():
            raise ValueError("what it makes of a text depends on what comes after it, or on padding before it.")
        return lm
    except Exception as error:  # of many kinds: files, fields of the config, patterns of modules, templates, shapes
        if out_of_memory(error):
            raise
        raise UserError(
            f"Cannot load the model {name!r}: {first_line(error)}\n"
            f"Give a local folder, or fetch it where there is a network (hf download {source}), or use --model tiny (built in)."
        ) from None


def has_4bit(device):
    """Whether bitsandbytes can hold 4-bit weights on this device; says so in one line where it cannot."""
    found = device != "mps" and find_spec("bitsandbytes") is not None
    if not found:
        print(f"There is no bitsandbytes for {device} here: the base stays unquantised, as with --bits 16.")
    return found

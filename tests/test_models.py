"""The base, its adapters and heads, the tokens, the log-probabilities."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import batch, shake
from safetensors.torch import load_file, save_file

import models
import plan
from errors import UserError
from tokens import Tokens


def gradients(lm, tokens):
    lm.activate("role", train=True)
    loss = -lm.logprobs(tokens).sum()
    loss.backward()
    found = [p.grad.clone() for p in lm.parameters("role")]
    for p in lm.parameters("role"):
        p.grad = None
    return found


def test_gradients_before_and_after_generation_are_equal_in_4bit(lm4, pairs):
    lm4.add("role")
    shake(lm4, "role")
    tokens = batch(lm4, pairs)
    before = gradients(lm4, tokens)
    lm4.generate("role", [lm4.encode_prompt(pairs[0].prompt)], 8)
    after = gradients(lm4, tokens)
    assert max(g.abs().max() for g in before) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_4bit_gradients_are_those_of_the_same_weights_dequantised(lm4, pairs):
    """A wrong backward pass of bitsandbytes would show here."""
    import bitsandbytes as bnb

    lm4.add("role")
    shake(lm4, "role")
    tokens = batch(lm4, pairs)
    quantised = gradients(lm4, tokens)
    for module in list(lm4.peft.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = torch.nn.Linear(
                    child.in_features, child.out_features, bias=child.bias is not None
                )
                plain.weight.data = bnb.functional.dequantize_4bit(
                    child.weight.data, child.weight.quant_state
                ).float()
                if child.bias is not None:
                    plain.bias.data = child.bias.data.float()
                setattr(module, name, plain.requires_grad_(False))
    exact = gradients(lm4, tokens)
    for a, b in zip(quantised, exact):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_naive_full_vocabulary_ones(lm, pairs, temperature, monkeypatch):
    monkeypatch.setattr(models, "LOGIT_CHUNK", 7)  # many chunks, the last one ragged
    lm.add("role")
    shake(lm, "role")
    tokens = batch(lm, pairs)
    ours = lm.logprobs(tokens, temperature)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    our_grads = [p.grad.clone() for p in lm.parameters("role")]
    for p in lm.parameters("role"):
        p.grad = None
    # the naive way: each row alone, without padding, over the whole sequence
    naive = torch.zeros_like(ours)
    for i in range(len(tokens.ids)):
        ids = tokens.ids[i][tokens.mask[i].bool()]
        n = int(tokens.response_mask[i].sum())
        logits = lm.peft(input_ids=ids[None]).logits[0] / temperature
        naive[i, :n] = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[-n:, 0]
    (naive * weights).sum().backward()
    torch.testing.assert_close(ours, naive, atol=2e-5, rtol=1e-4)
    for ours, p in zip(our_grads, lm.parameters("role")):
        torch.testing.assert_close(ours, p.grad, atol=2e-4, rtol=1e-3)


def test_collate_masks_come_from_lengths(lm):
    tokens = lm.collate(
        [[lm.pad, 7], [8]], [[9, lm.eos], [lm.pad, 9, lm.eos]]
    )  # a pad token typed by somebody is text
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert tokens.response_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert lm.pad != lm.eos


def test_training_one_adapter_leaves_base_and_others_bitwise_unchanged(lm4, pairs):
    lm4.add("role", head=True)
    lm4.add("other", head=True)
    lm4.generate(
        "blank", [lm4.encode_prompt(pairs[0].prompt)], 1
    )  # bitsandbytes casts biases once, at the first forward
    trained = {id(p) for p in lm4.parameters("role")}
    everything = [*lm4.peft.parameters(), *lm4.heads.parameters()]
    before = [(p, p.detach().clone()) for p in everything if id(p) not in trained]
    old = [p.detach().clone() for p in lm4.parameters("role")]
    optimizer = models.adamw(lm4.parameters("role"), lr=1e-2)
    for _ in range(2):  # B is zero at first, so A moves at the second step only
        lm4.activate("role", train=True)
        (-lm4.logprobs(batch(lm4, pairs)).sum() + lm4.scores(batch(lm4, pairs)).sum()).backward()
        lm4.generate("other", [lm4.encode_prompt(pairs[0].prompt)], 4)
        models.take_step(optimizer, lr=1e-2)
    assert all(torch.equal(p, value) for p, value in before)
    assert not any(torch.equal(p, value) for p, value in zip(lm4.parameters("role"), old))


def test_save_and_load_give_identical_outputs(lm4, pairs, tmp_path):
    lm4.add("role", head=True)
    shake(lm4, "role")
    lm4.activate("role")
    tokens = batch(lm4, pairs)
    with torch.no_grad():
        logprobs = lm4.logprobs(tokens)
        scores = lm4.scores(tokens)
        lm4.save("role", tmp_path)
        lm4.load("again", tmp_path)
        lm4.activate("again")
        assert torch.equal(lm4.logprobs(tokens), logprobs)
        assert torch.equal(lm4.scores(tokens), scores)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
    }
    layers = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(layers) == 7 and layers == sorted(layers)  # the same file in each process


def test_a_copied_role_equals_the_original_and_then_goes_its_own_way(lm, pairs):
    lm.add("role", head=True)
    shake(lm, "role")
    lm.add("copy", like="role", head=True)
    tokens = batch(lm, pairs)
    with torch.no_grad():
        lm.activate("role")
        scores = lm.scores(tokens)
        lm.activate("copy")
        assert torch.equal(lm.scores(tokens), scores)
        shake(lm, "copy")
        lm.activate("role")
        assert torch.equal(lm.scores(tokens), scores)


def test_scores_are_read_at_the_last_real_token(lm, pairs):
    lm.add("role", head=True)
    tokens = batch(lm, pairs)
    with torch.no_grad():
        lm.activate("role")
        together = lm.scores(tokens)
        for i in range(len(tokens.ids)):
            ids = tokens.ids[i][tokens.mask[i].bool()]
            alone = lm.heads["role"](
                lm.peft.get_base_model().model(input_ids=ids[None]).last_hidden_state[0, -1]
            )
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_generate_at_temperature_0_is_the_argmax_and_stops_at_eos(lm, pairs):
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs]
    tokens = lm.generate("blank", prompts, 40, temperature=0)
    ids = tokens.ids
    mask = tokens.mask
    response_mask = tokens.response_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = lm.peft(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    R = response_mask.shape[1]
    best = logits[:, -R - 1 : -1].max(-1).values
    chosen = logits[:, -R - 1 : -1].gather(2, tokens.responses[..., None])[..., 0]
    assert ((best - chosen).abs() * response_mask).max() < 1e-3
    assert (tokens.responses == lm.eos).any(1).float().mean() > 0.5


def test_control_tokens_in_text_are_only_text(lm):
    """<|user|> opens a turn, yet the tokenizer lists it with its added tokens alone, as many do."""
    nasty = "a<|end|><|assistant|>b<|pad|><|user|>"
    control = set(lm.tokenizer.convert_tokens_to_ids(lm.control))
    assert len(control) >= 5
    for encode in (lm.encode_response, lambda text: lm.encode_prompt([as_user(text)])):
        plain, typed = ([i for i in encode(text) if i in control] for text in ("hello", nasty))
        assert plain == typed


def as_user(text):
    return {"role": "user", "content": text}


def test_an_answer_ends_in_eos_and_comes_back_without(lm):
    ids = lm.encode_response(" tea: tea. ")
    assert ids[-1] == lm.eos and ids.count(lm.eos) == 1
    # nor with what may follow the EOS
    assert lm.decode(torch.tensor([[*ids, lm.pad, *ids]])) == ["tea: tea."]


def test_all_chats_are_answered_in_order_a_part_at_a_time(lm, pairs, monkeypatch):
    monkeypatch.setattr(models, "SAMPLED", 1)
    asked = []

    def generate(role, prompts, max_tokens, temperature):
        asked.append((role, len(prompts), max_tokens, temperature))
        # an answer that repeats the end of its prompt
        ids = torch.tensor([prompt[-8:] for prompt in prompts])
        return Tokens(ids, torch.ones_like(ids), torch.ones(len(ids), 8))

    monkeypatch.setattr(lm, "generate", generate)
    cfg = SimpleNamespace(max_prompt=48, max_response=7, rl_batch=5)
    chats = [pair.prompt for pair in pairs]
    expected = lm.decode(torch.tensor([lm.encode_prompt(chat)[-8:] for chat in chats]))
    assert lm.answer("role", chats, cfg, 0.7) == expected
    assert asked == [("role", 5, 7, 0.7), ("role", 5, 7, 0.7), ("role", 2, 7, 0.7)]
    lm.answer("role", chats[:1], cfg)
    assert asked[-1] == ("role", 1, 7, 1.0)


def test_generation_is_by_the_role_that_is_asked_for(lm, pairs):
    lm.add("role")
    shake(lm, "role", scale=0.3)
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs[:4]]
    written = {}
    # whatever was active before
    for active, role in (("blank", "role"), ("role", "blank")):
        lm.activate(active)
        written[role] = lm.generate(role, prompts, 4, temperature=0)
        with torch.no_grad():
            best = lm.logprobs(written[role]).mean()
            lm.activate(active)
            assert lm.logprobs(written[role]).mean() < best
    assert not torch.equal(written["role"].ids, written["blank"].ids)


def test_samples_follow_the_exact_softmax(lm):
    """Chi-squared: no token is cut from the distribution, and the temperature is in effect."""
    # a longer prompt puts padding before the one that is sampled from
    prompt = [20, 30, 40]
    longer = [9, 9, 20, 30, 40]
    n = 1500
    temperature = 3.0
    torch.manual_seed(0)
    drawn = lm.generate("blank", [prompt] * n + [longer], 1, temperature).responses[:n, 0]
    with torch.no_grad():
        logits = lm.peft(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = n * (logits / temperature).softmax(-1).double()
    observed = drawn.bincount(minlength=len(expected)).double()
    # tokens that are expected less than five times share one bin
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum(0, keepdim=True)])
    observed = torch.cat([observed[often], observed[~often].sum(0, keepdim=True)])
    chi_squared = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_a_step_is_clipped_to_norm_1_taken_at_its_rate_and_leaves_no_gradient():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([p], lr=9.0)
    for scale, expected in ((1.0, [2.94, 3.92]), (0.1, [2.91, 3.88])):
        (scale * p * torch.tensor([3.0, 4.0])).sum().backward()
        assert models.take_step(optimizer, lr=0.1).item() == pytest.approx(5 * scale)
        assert p.tolist() == pytest.approx(expected) and p.grad is None


def test_no_weight_decays_and_a_new_head_has_outputs_of_unit_variance():
    optimizer = models.adamw([torch.nn.Parameter(torch.ones(1))], lr=0.1, eps=1e-5)
    assert optimizer.defaults["weight_decay"] == 0.0 and optimizer.defaults["eps"] == 1e-5
    torch.manual_seed(0)
    head = models.new_head(10_000, "cpu")
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and head.bias.item() == 0.0


def test_nothing_requires_a_gradient_unless_it_is_trained(lm):
    lm.add("role", head=True)
    lm.activate("role", train=True)
    assert any(p.requires_grad for p in lm.peft.parameters())
    assert all(p.requires_grad for p in lm.heads["role"].parameters())
    # what requires a gradient is what the optimiser gets, the head's weight and bias included
    trained = {id(p) for p in lm.parameters("role")}
    assert trained >= {id(p) for p in lm.heads["role"].parameters()}
    lm.activate("role")
    assert not any(p.requires_grad for p in [*lm.peft.parameters(), *lm.heads.parameters()])


def test_the_models_own_sampling_options_do_not_leak_in(lm, pairs, tmp_path):
    shutil.copytree(models.TINY, tmp_path / "fussy")
    own = dict(
        top_k=1,
        top_p=0.01,
        repetition_penalty=9.0,
        no_repeat_ngram_size=2,
        min_new_tokens=19,
        do_sample=True,
    )
    (tmp_path / "fussy" / "generation_config.json").write_text(json.dumps(own))
    fussy = models.load_model(str(tmp_path / "fussy"), bits=16)
    prompts = [lm.encode_prompt(pairs[0].prompt)] * 8
    for temperature in (0.0, 1.0):
        torch.manual_seed(0)
        plain = lm.generate("blank", prompts, 20, temperature)
        torch.manual_seed(0)
        assert plain.ids.tolist() == fussy.generate("blank", prompts, 20, temperature).ids.tolist()


def test_padding_changes_nothing_where_positions_are_absolute(lm, tmp_path):
    """GPT-2 adds a vector for each position, so it notices counted padding. Qwen2 does not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    gpt = models.load_model(str(tmp_path), bits=16)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    responses = [[20, 21], [22, 23, 24]]
    with torch.no_grad():
        together = gpt.logprobs(gpt.collate(prompts, responses))
        for row, prompt, response in zip(together, prompts, responses):
            alone = gpt.logprobs(gpt.collate([prompt], [response]))[0]
            torch.testing.assert_close(row[: len(response)], alone, atol=1e-5, rtol=1e-5)


def random_model(lm, folder, model_type, **options):
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
    )
    config = transformers.AutoConfig.for_model(
        model_type, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return models.load_model(str(folder), bits=16)


WINDOW = {"gemma3_text": dict(head_dim=16, sliding_window=8), "mistral": dict(sliding_window=8)}


@pytest.mark.parametrize("model_type", [*models.SHARED_ROW, *WINDOW, "bloom"])
def test_candidates_share_a_row_only_where_that_changes_nothing(lm, tmp_path, model_type):
    """Windows would be lost with the mask of a shared row, and Bloom cannot read such a mask."""
    other = random_model(lm, tmp_path, model_type, **WINDOW.get(model_type, {}))
    other.add("role", head=True)
    shake(other, "role")
    prompts = [[*range(5, 30)], [*range(8, 15)]]
    candidates = [[[20, 21, 22], [30, 31]], [[40], [41, 42, 43, 44]]]
    with torch.no_grad():
        scores = other.scores_of_candidates(prompts, candidates)
        alone = torch.stack(
            [other.scores(other.collate(prompts, list(texts))) for texts in zip(*candidates)],
            1,
        )
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)
    assert other.shared_row == (model_type in models.SHARED_ROW)


def test_a_window_that_a_model_type_may_have_is_not_lost_either(lm, tmp_path):
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert not random_model(lm, tmp_path, "qwen2", **window).shared_row


# these would train on other log-probs than those by which they write: bert reads what comes later,
# the others change their logits after the LM head
MISTAKEN = {
    "bert": {},
    "gemma2": dict(head_dim=16, final_logit_softcapping=4.0),  # caps the largest logits alone
    "granite": dict(logits_scaling=8.0),
    "cohere": dict(logit_scale=0.0625),
}


@pytest.mark.parametrize("model_type", MISTAKEN)
def test_a_model_whose_log_probs_would_be_wrong_is_refused(lm, tmp_path, model_type):
    with pytest.raises(UserError, match="on later tokens, or on something.*\n.*another --model"):
        random_model(lm, tmp_path, model_type, **MISTAKEN[model_type])


@pytest.mark.parametrize(
    "files", [{}, {"config.json": "{"}, {"config.json": '{"model_type": "nonesuch"}'}]
)
def test_a_folder_that_is_no_model_is_one_message(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in (str(tmp_path), "no/such-model", "Qwen2-0.5B"):
        with pytest.raises(
            UserError, match="Cannot load the model .*\n.*local folder.*hf download.*tiny"
        ) as error:
            models.load_model(name)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 2


def test_pickles_remote_code_and_damaged_weights_are_refused(lm, tmp_path):
    base = lm.peft.unload()
    lm.tokenizer.save_pretrained(tmp_path)
    base.config.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError):
        models.load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(UserError):
        models.load_model(str(tmp_path))
    base.save_pretrained(tmp_path)
    models.load_model(str(tmp_path), bits=16)
    config = (tmp_path / "config.json").read_text()
    remote = '{"auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}, '
    (tmp_path / "config.json").write_text(
        config.replace("{", remote, 1).replace('"qwen2"', '"mine"')
    )
    (tmp_path / "x.py").write_text(
        "open('ran', 'w')\nfrom transformers import Qwen2Config as C, Qwen2ForCausalLM as M"
    )
    with pytest.raises(UserError):
        models.load_model(str(tmp_path))


def test_reading_prompts_in_pieces_changes_no_sample(lm4, pairs, monkeypatch):
    lm4.add("role")
    shake(lm4, "role")
    prompts = [
        lm4.encode_prompt(pair.prompt)[: 40 - 5 * i] for i, pair in enumerate(pairs[:6])
    ]  # padded on the left
    sampled = []
    for size in (128, 7):
        monkeypatch.setattr(models, "PREFILL", size)
        torch.manual_seed(0)
        sampled.append(lm4.generate("role", prompts, 12).ids.tolist())
    assert sampled[0] == sampled[1]


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models.TINY / name, tmp_path)
    with pytest.raises(UserError, match="tokenizer are missing"):
        models.load_model(str(tmp_path), bits=16)


def test_an_adapter_on_the_lm_head_counts_in_log_probs_too(pairs):
    lm = models.load_model("tiny", bits=16, target_modules=".*(q_proj|lm_head)")
    lm.add("role")
    lm.activate("role", train=True)
    lm.logprobs(batch(lm, pairs)).sum().backward()
    assert all(p.grad is not None for p in lm.parameters("role"))


def test_short_names_stand_for_hub_ids_and_folders_come_first(tmp_path, monkeypatch):
    assert (
        models.find_model("Qwen2-0.5B") == "Qwen/Qwen2-0.5B"
        and models.find_model("Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    )
    assert models.find_model("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (
        models.find_model("me/Qwen2-mine") == "me/Qwen2-mine"
        and models.find_model("https://huggingface.co/me/mine") == "me/mine"
        and models.find_model("tiny") == models.TINY
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen2-0.5B").mkdir()
    assert models.find_model("Qwen2-0.5B") == "Qwen2-0.5B"


def test_the_built_in_base_is_found_beside_a_run_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny" / "adapters").mkdir(parents=True)
    models.check_model.__wrapped__("tiny")
    with pytest.raises(UserError, match="./tiny is a run, not a model"):
        models.check_model("./tiny")


def test_a_layer_pattern_that_fits_nothing_is_said():
    with pytest.raises(UserError, match="nothing_like_it"):
        models.load_model("tiny", bits=16, target_modules="nothing_like_it")


@pytest.mark.parametrize("then", ["{{ raise_exception('no system') }}", "{# not a word #}"])
def test_a_template_without_system_messages_gets_them_in_the_users_turn(lm, then):
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + then
        + "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}<|assistant|>"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "map"}]
    assert lm.encode_prompt(turns) == lm.encode_prompt(
        [{"role": "user", "content": "Be brief.\n\nmap"}]
    )


def test_a_model_without_a_template_gets_a_plain_dialogue_with_the_bos_that_it_has(lm):
    messages = [as_user("map"), {"role": "assistant", "content": "a"}, as_user("b")]
    for bos in (None, "<|user|>"):
        lm.tokenizer.chat_template = None
        lm.tokenizer.bos_token = bos
        plain = models.LM(lm.peft.unload(), lm.tokenizer, lm.lora)
        text = "User:\nmap\n\nAssistant:\na\n\nUser:\nb\n\nAssistant:\n"
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = [lm.tokenizer.bos_token_id] if bos else []
        assert plain.encode_prompt(messages) == begin + ids
        assert plain.eos == lm.tokenizer.eos_token_id


@pytest.mark.parametrize("bits", [4, 16])
def test_checkpointed_layers_change_no_gradient_and_no_sample(lm, lm4, pairs, bits):
    model = {4: lm4, 16: lm}[bits]
    model.add("role")
    shake(model, "role")
    tokens = batch(model, pairs)
    prompt = [model.encode_prompt(pairs[0].prompt)]
    torch.manual_seed(0)
    before = gradients(model, tokens)
    sampled = model.generate("role", prompt, 12).ids
    model.checkpoint_layers()
    calls = []
    layer = model.peft.get_base_model().get_decoder().layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    after = gradients(model, tokens)
    assert len(calls) == 2  # computed again in the backward pass
    assert torch.equal(model.generate("role", prompt, 12).ids, sampled)
    assert len(calls) == 2 + sampled.shape[1] - len(
        prompt[0]
    )  # once a sampled token: nothing is computed twice there
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_memory_by_arithmetic_counts_weights_and_adapters_exactly(lm):
    cfg = SimpleNamespace(
        max_prompt=64,
        max_response=32,
        micro_batch=4,
        sft_batch=2,
        minibatch=8,
        rm_batch=2,
        rl_batch=1,
        rounds="annotated,policy",
    )
    base = lm.peft.get_base_model()
    before = plan.estimate_memory(lm, cfg)
    # as many in memory as a micro-batch has, or the larger of SFT's and PPO's batches, or R_PIT's
    swapped = SimpleNamespace(**vars(cfg) | dict(sft_batch=8, minibatch=2))
    assert plan.estimate_memory(lm, swapped) == before
    smaller = plan.estimate_memory(lm, SimpleNamespace(**vars(cfg) | dict(micro_batch=2)))
    for work, times in ("SFT, PPO update", 2), ("reward models", 1):
        assert before[work]["activations"] == times * smaller[work]["activations"]
    frozen = sum(
        p.numel() * p.element_size() for name, p in base.named_parameters() if "lora" not in name
    )
    lora = sum(p.numel() * 4 for p in lm.parameters("blank"))
    lm.add("policy_sft")  # as where `rl` goes on
    assert plan.estimate_memory(lm, cfg) == before
    lm.checkpoint_layers()
    after = plan.estimate_memory(lm, cfg)
    for work in ("SFT, PPO update", "reward models"):
        assert (
            before[work]["weights"] == frozen / 2**30
            and before[work]["adapters"] == 9 * lora / 2**30
        )
        assert after[work]["activations"] < before[work]["activations"] / 2


@pytest.mark.parametrize(
    "max_prompt, max_response, rl_batch, rows",
    [
        (48, 30, 64, 256),  # short texts: four batches of PPO
        (384, 128, 8, 32),
        (384, 128, 64, 64),  # long ones: one batch, which PPO writes at a time anyway
    ],
)
def test_one_to_four_batches_of_ppo_are_written_at_a_time(max_prompt, max_response, rl_batch, rows):
    cfg = SimpleNamespace(max_prompt=max_prompt, max_response=max_response, rl_batch=rl_batch)
    assert models.rows_at_a_time(cfg) == rows


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(lm, tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has .* tokens, its embedding only 64"):
        models.load_model(str(tmp_path), bits=16)


def test_an_answer_ends_as_the_template_ends_turns(lm):
    """Qwen2's case: the tokenizer's own EOS is another token."""
    lm.tokenizer.eos_token = "<|pad|>"
    assert models.end_of_turn(lm.tokenizer) == lm.tokenizer.convert_tokens_to_ids("<|end|>")


def test_an_end_that_only_the_added_tokens_call_special_is_found(tmp_path):
    """Gemma 3's and Phi-3's case: it is none of the tokenizer's named special tokens."""
    shutil.copytree(models.TINY, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"extra_special_tokens": [], "eos_token": "<|pad|>"}
    file.write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(tmp_path / "base")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert models.end_of_turn(tokenizer) == end


@pytest.mark.parametrize("equal_rows, is_used", [(8, True), (9, False)])
def test_an_end_that_the_base_has_never_seen_is_not_used(lm, equal_rows, is_used):
    """A base model's template may have tokens that no text of its training had, like its spares."""
    end = lm.eos
    own = lm.tokenizer.convert_tokens_to_ids("<|pad|>")
    lm.tokenizer.eos_token = "<|pad|>"
    base = lm.peft.unload()
    rows = base.get_output_embeddings().weight
    with torch.no_grad():
        rows[100 : 100 + equal_rows - 1] = 1.001 * rows[end]
    other = models.LM(base, lm.tokenizer, lm.lora)
    assert other.eos == (end if is_used else own) != other.pad


def test_an_answer_may_end_with_the_bases_own_eos(lm):
    """As one by an untrained base, whose template ends turns with another token."""
    lm.tokenizer.eos_token = "<|user|>"
    row = [*lm.encode_response("tea: tea.")[:-1], lm.tokenizer.eos_token_id, lm.eos + 1, lm.eos]
    assert lm.decode(torch.tensor([row])) == ["tea: tea."]


def test_a_prompt_is_the_same_on_another_day_and_asks_for_no_thoughts(lm):
    """Llama 3.2 writes the date of today; Qwen3 leaves room to think unless told not to."""
    lm.tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% if enable_thinking is not defined or enable_thinking %}"
        "<think>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    lm = models.LM(lm.peft.unload(), lm.tokenizer, lm.lora)
    assert lm.tokenizer.apply_chat_template([as_user("map")], tokenize=False) == (
        "26 Jul 2024<|user|>map"
    )


def test_of_several_templates_the_default_one_counts(lm):
    kept = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = {"tool_use": "{{ messages }}", "default": kept}
    named = models.LM(lm.peft.unload(), lm.tokenizer, lm.lora)
    assert "<|user|>" in named.control and named.control == lm.control
    assert named.encode_prompt([as_user("map")]) == lm.encode_prompt([as_user("map")])


def test_control_tokens_that_were_sampled_are_no_text(lm):
    user = lm.tokenizer.convert_tokens_to_ids("<|user|>")
    assert lm.decode(torch.tensor([[user, *lm.encode_response("tea: tea.")]])) == ["tea: tea."]


def test_a_base_without_all_its_weights_is_refused(tmp_path):
    """transformers would draw the others at random, and at each start anew."""
    shutil.copytree(models.TINY, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 12 tensors, such as model.layers.1."):
        models.load_model(str(tmp_path / "base"))


def test_a_template_that_shows_the_last_turn_alone_is_refused(tmp_path):
    """PIT would never see what it is to improve."""
    shutil.copytree(models.TINY, tmp_path / "base")
    template = "<|user|>{{ messages[-1].content }}<|end|><|assistant|>"
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="does not show all turns"):
        models.load_model(str(tmp_path / "base"))


def test_four_bits_are_nf4(lm4):
    kinds = {p.quant_type for p in lm4.peft.parameters() if hasattr(p, "quant_type")}
    assert kinds == {"nf4"}


def test_cards_without_bf16_compute_in_fp32_and_none_by_cudnn(monkeypatch):
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert models.best_device() == ("cuda", torch.float32)


def multiplies_in(lm):
    return {layer.compute_dtype for layer in lm.peft.modules() if hasattr(layer, "compute_dtype")}


def test_a_cpu_with_bf16_computes_in_it_but_for_the_built_in_base(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert models.best_device() == ("cpu", torch.float32)  # as in all tests, see conftest.py
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert models.best_device() == ("cpu", torch.bfloat16)
    shutil.copytree(models.TINY, tmp_path / "base")
    copy = models.load_model(str(tmp_path / "base"), bits=4)
    assert copy.lm_head.weight.dtype == torch.bfloat16
    assert multiplies_in(copy) == {torch.bfloat16}
    tiny = models.load_model("tiny", bits=4)
    assert tiny.lm_head.weight.dtype == torch.float32
    assert multiplies_in(tiny) == {torch.float32}

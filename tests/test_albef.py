"ALBEF against an independent reading in plain torch, its checkpoints in their own naming, towers from folders, and what the model promises to its objectives."
import dataclasses, json, math
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from vlwb.core import DataError, make_generator, seed_everything
from vlwb.losses.infonce import infonce
from vlwb.losses.queue import Queue, momentum_copy, momentum_update_
from vlwb.models.albef import AlbefConfig, AlbefModel, albef_base, albef_tiny, parameter_counts
from vlwb.models.checkpoints import albef_from_towers, infer_config, load_albef, official_names, official_state_dict, read_tensors, resize_positions, save_albef
from vlwb.models.dual import DualEncoder, DualEncoderConfig

SEE, READ, LAYERS, HALF, HEADS, PATCH, SIDE, WORDS, LENGTH, D, QUEUE = 24, 32, 4, 2, 4, 4, 3, 40, 12, 16, 10


def layer_shapes(prefix, width, other):
    "Shapes of an attention block with its output LayerNorm, in BERT's naming; `other` is the width that keys and values read."
    shapes = {}
    for name, read in (('self.query', width), ('self.key', other), ('self.value', other), ('output.dense', width)): shapes |= {f'{prefix}.{name}.weight': (width, read), f'{prefix}.{name}.bias': (width,)}
    return shapes | {f'{prefix}.output.LayerNorm.weight': (width,), f'{prefix}.output.LayerNorm.bias': (width,)}


def official_shapes(momentum=True, queue=True):
    "Every name of a public checkpoint with tiny shapes, written down from the published naming (not from the package)."
    s = {'temp': (), 'itm_head.weight': (2, READ), 'itm_head.bias': (2,)}
    for m in ('', '_m') if momentum else ('',):
        v, t = f'visual_encoder{m}', f'text_encoder{m}.bert'
        s |= {f'{v}.cls_token': (1,1,SEE), f'{v}.pos_embed': (1,1+SIDE*SIDE,SEE), f'{v}.patch_embed.proj.weight': (SEE,3,PATCH,PATCH), f'{v}.patch_embed.proj.bias': (SEE,), f'{v}.norm.weight': (SEE,), f'{v}.norm.bias': (SEE,)}
        for i in range(2):
            b = f'{v}.blocks.{i}'
            for name, shape in (('norm1', (SEE,)), ('attn.qkv', (3*SEE, SEE)), ('attn.proj', (SEE, SEE)), ('norm2', (SEE,)), ('mlp.fc1', (2*SEE, SEE)), ('mlp.fc2', (SEE, 2*SEE))):
                s |= {f'{b}.{name}.weight': shape, f'{b}.{name}.bias': shape[:1]}
        s |= {f'{t}.embeddings.position_ids': (1, LENGTH), f'{t}.embeddings.word_embeddings.weight': (WORDS, READ), f'{t}.embeddings.position_embeddings.weight': (LENGTH, READ),
              f'{t}.embeddings.token_type_embeddings.weight': (2, READ), f'{t}.embeddings.LayerNorm.weight': (READ,), f'{t}.embeddings.LayerNorm.bias': (READ,)}
        for i in range(LAYERS):
            l = f'{t}.encoder.layer.{i}'
            s |= layer_shapes(f'{l}.attention', READ, READ)
            if i >= HALF: s |= layer_shapes(f'{l}.crossattention', READ, SEE)
            s |= {f'{l}.intermediate.dense.weight': (3*READ, READ), f'{l}.intermediate.dense.bias': (3*READ,), f'{l}.output.dense.weight': (READ, 3*READ), f'{l}.output.dense.bias': (READ,),
                  f'{l}.output.LayerNorm.weight': (READ,), f'{l}.output.LayerNorm.bias': (READ,)}
        p = f'text_encoder{m}.cls.predictions'
        s |= {f'{p}.bias': (WORDS,), f'{p}.transform.dense.weight': (READ, READ), f'{p}.transform.dense.bias': (READ,), f'{p}.transform.LayerNorm.weight': (READ,), f'{p}.transform.LayerNorm.bias': (READ,),
              f'{p}.decoder.weight': (WORDS, READ), f'{p}.decoder.bias': (WORDS,)}
        s |= {f'vision_proj{m}.weight': (D, SEE), f'vision_proj{m}.bias': (D,), f'text_proj{m}.weight': (D, READ), f'text_proj{m}.bias': (D,)}
    if queue: s |= dict(image_queue=(D, QUEUE), text_queue=(D, QUEUE), queue_ptr=(1,))
    return s


def official(momentum=True, queue=True, seed=0):
    "A checkpoint with weights large enough that attention is far from uniform and every tensor matters."
    g, s = make_generator(seed), {}
    for name, shape in official_shapes(momentum, queue).items():
        if name.endswith('position_ids'): s[name] = torch.arange(LENGTH)[None]
        elif name == 'queue_ptr': s[name] = torch.tensor([4])
        elif name == 'temp': s[name] = torch.tensor(0.05)
        elif name.endswith('_queue'): s[name] = F.normalize(torch.randn(shape, generator=g), dim=0)
        elif 'norm' in name.lower() and name.endswith('weight'): s[name] = 1 + 0.3*torch.randn(shape, generator=g)
        elif name.endswith(('cls_token', 'pos_embed')) or 'embeddings' in name: s[name] = torch.randn(shape, generator=g)
        elif len(shape) > 1: s[name] = torch.randn(shape, generator=g) * 1.5/math.sqrt(math.prod(shape[1:]))
        else: s[name] = 0.3*torch.randn(shape, generator=g)
    for m in ('', '_m') if momentum else ('',):
        p = f'text_encoder{m}.cls.predictions'
        s[f'{p}.decoder.weight'], s[f'{p}.decoder.bias'] = s[f'text_encoder{m}.bert.embeddings.word_embeddings.weight'].clone(), s[f'{p}.bias'].clone()
    return s


class Reading:
    "ALBEF as its paper and its public checkpoints describe it: linear maps, LayerNorms and softmax on tensors taken by name."
    def __init__(self, state, m='', dtype=torch.float32):
        self.s, self.m = {k: x.to(dtype) if x.is_floating_point() else x for k, x in state.items()}, m

    def linear(self, name, x): return F.linear(x, self.s[f'{name}.weight'], self.s[f'{name}.bias'])

    def norm(self, name, x, eps): return F.layer_norm(x, x.shape[-1:], self.s[f'{name}.weight'], self.s[f'{name}.bias'], eps)

    def attend(self, q, k, v, mask=None):
        cut = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        scores = cut(q) @ cut(k).transpose(2, 3) / math.sqrt(q.shape[-1] // HEADS)
        if mask is not None: scores = scores.masked_fill(~mask.bool()[:,None,None,:], float('-inf'))
        return (scores.softmax(-1) @ cut(v)).transpose(1, 2).flatten(2)

    def image(self, x):
        v = f'visual_encoder{self.m}'
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
        x = F.linear(patches, self.s[f'{v}.patch_embed.proj.weight'].flatten(1), self.s[f'{v}.patch_embed.proj.bias'])
        x = torch.cat([self.s[f'{v}.cls_token'].expand(len(x), 1, SEE), x], 1) + self.s[f'{v}.pos_embed']
        for i in range(2):
            b = f'{v}.blocks.{i}'
            x = x + self.linear(f'{b}.attn.proj', self.attend(*self.linear(f'{b}.attn.qkv', self.norm(f'{b}.norm1', x, 1e-6)).chunk(3, -1)))
            x = x + self.linear(f'{b}.mlp.fc2', F.gelu(self.linear(f'{b}.mlp.fc1', self.norm(f'{b}.norm2', x, 1e-6))))
        return self.norm(f'{v}.norm', x, 1e-6)

    def bert_attention(self, name, x, source, mask):
        a = self.attend(self.linear(f'{name}.self.query', x), self.linear(f'{name}.self.key', source), self.linear(f'{name}.self.value', source), mask)
        return self.norm(f'{name}.output.LayerNorm', self.linear(f'{name}.output.dense', a) + x, 1e-12)

    def bert(self, x, mask, start, end, image=None):
        for i in range(start, end):
            l = f'text_encoder{self.m}.bert.encoder.layer.{i}'
            x = self.bert_attention(f'{l}.attention', x, x, mask)
            if image is not None: x = self.bert_attention(f'{l}.crossattention', x, image, None)
            x = self.norm(f'{l}.output.LayerNorm', self.linear(f'{l}.output.dense', F.gelu(self.linear(f'{l}.intermediate.dense', x))) + x, 1e-12)
        return x

    def text(self, ids, mask):
        e = f'text_encoder{self.m}.bert.embeddings'
        x = self.s[f'{e}.word_embeddings.weight'][ids] + self.s[f'{e}.position_embeddings.weight'][:ids.shape[1]] + self.s[f'{e}.token_type_embeddings.weight'][0]
        return self.bert(self.norm(f'{e}.LayerNorm', x, 1e-12), mask, 0, HALF)

    def feature(self, side, states):
        x = self.linear(f'{side}_proj{self.m}', states[:,0])
        return x / x.norm(dim=1, keepdim=True)

    def fused(self, ids, mask, image): return self.bert(self.text(ids, mask), mask, HALF, LAYERS, image)

    def words(self, fused):
        p = f'text_encoder{self.m}.cls.predictions'
        x = self.norm(f'{p}.transform.LayerNorm', F.gelu(self.linear(f'{p}.transform.dense', fused)), 1e-12)
        return F.linear(x, self.s[f'{p}.decoder.weight'], self.s[f'{p}.bias'])


def inputs(n=5, length=9, seed=3):
    g = make_generator(seed)
    lengths = torch.randint(2, length + 1, (n,), generator=g); lengths[0] = length
    mask = (torch.arange(length) < lengths[:,None]).long()
    return torch.randn(n, 3, PATCH*SIDE, PATCH*SIDE, generator=g), dict(input_ids=torch.randint(1, WORDS, (n,length), generator=g)*mask, attention_mask=mask)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize('which', ['model', 'momentum'])
@pytest.mark.parametrize('padded', [False, True])
@torch.no_grad()
def test_parity_with_an_independent_reading(dtype, tolerance, which, padded):
    "Fused [CLS], ITC features, ITM and MLM logits, for a model and its momentum copy."
    state = official()
    model = getattr(load_albef(state, heads=HEADS), which).to(dtype)
    reading = Reading(state, '_m' if which == 'momentum' else '', dtype)
    images, texts = inputs(); images = images.to(dtype)
    if not padded: texts['attention_mask'] = torch.ones_like(texts['attention_mask'])
    ids, mask = texts['input_ids'], texts['attention_mask']
    seen, read = reading.image(images), reading.text(ids, mask)
    fused = reading.fused(ids, mask, seen)
    close = lambda a, b: assert_close(a, b, atol=tolerance, rtol=tolerance)
    mine_seen, mine_read = model.image_states(images), model.text_states(texts)
    mine = model.fuse(mine_read, mask, mine_seen)
    close(mine_seen, seen); close(mine_read[mask.bool()], read[mask.bool()])
    close(model.project_image(mine_seen), reading.feature('vision', seen)); close(model.project_text(mine_read), reading.feature('text', read))
    close(mine[:,0], fused[:,0]); close(mine[mask.bool()], fused[mask.bool()])
    close(model.match_logits(mine), reading.linear('itm_head', fused[:,0]))
    close(model.token_logits(mine)[mask.bool()], reading.words(fused)[mask.bool()])
    out = model(images, texts)
    close(out.image_features, reading.feature('vision', seen)); close(out.text_features, reading.feature('text', read)); assert_close(out.logit_scale.item(), 20., rtol=1e-6, atol=0)


def test_the_reading_is_sensitive():
    "The parity above would notice every single tensor: changing any one of them changes what is compared."
    state, (images, texts) = official(momentum=False, queue=False), inputs(3)
    def outcome(s):
        r = Reading(s); seen = r.image(images); f = r.fused(texts['input_ids'], texts['attention_mask'], seen)
        return torch.cat([x.flatten() for x in (r.feature('vision', seen), r.feature('text', r.text(texts['input_ids'], texts['attention_mask'])), r.linear('itm_head', f[:,0]), r.words(f))])
    before = outcome(state)
    unused = [k for k, x in state.items() if x.is_floating_point() and torch.equal(outcome({**state, k: x + 0.1*torch.arange(1., x.numel() + 1).view(x.shape)/x.numel()}), before)]
    assert set(unused) == {'temp', 'text_encoder.cls.predictions.decoder.bias'}


@pytest.mark.parametrize('momentum', [False, True])
@pytest.mark.parametrize('queue', [False, True])
@pytest.mark.parametrize('form', ['dict', 'pth', 'plain pth', 'safetensors', 'ddp'])
def test_official_state_dicts_load(tmp_path, momentum, queue, form):
    state = official(momentum, queue)
    source = {f'module.{k}': x for k, x in state.items()} if form == 'ddp' else state
    if 'pth' in form: torch.save(dict(model=state, epoch=3, config=dict(temp=0.07)) if form == 'pth' else state, tmp_path/'a.pth'); source = tmp_path/'a.pth'
    if form == 'safetensors':
        from safetensors.torch import save_file
        save_file(state, str(tmp_path/'a.safetensors')); source = str(tmp_path/'a.safetensors')
    got = load_albef(source, heads=HEADS)
    r = got.report
    assert not r.missing and not r.unexpected and not r.resized and all(k.endswith('position_ids') for k in r.skipped)
    assert sorted(r.loaded + r.skipped) == sorted(state)                                            # every tensor is accounted for
    assert (got.momentum is not None) == momentum and (got.queue is not None) == queue and not got.model.training
    assert all(p.requires_grad for p in got.model.parameters())
    if momentum: assert not any(p.requires_grad for p in got.momentum.parameters()) and not got.momentum.training; momentum_update_(got.model, got.momentum)
    if queue:
        entries = got.queue.entries()
        assert len(got.queue) == QUEUE and int(got.queue.pointer) == 4 and (entries['queue_ids'] == -1).all()
        for i in range(QUEUE): assert_close(entries['image_queue'][i], state['image_queue'][:,i]); assert_close(entries['text_queue'][i], state['text_queue'][:,i])
        got.queue.enqueue_(F.normalize(torch.ones(2, D), dim=1), F.normalize(torch.ones(2, D), dim=1), torch.tensor([7, 8]))
        assert got.queue.queue_ids.tolist() == [-1]*4 + [7, 8] + [-1]*4                             # the next places, where ALBEF would go on


def test_parts_can_be_left_out():
    state = official()
    got = load_albef(state, heads=HEADS, momentum=False, queue=False)
    assert got.momentum is None and got.queue is None and not got.report.unexpected
    assert {k.partition('.')[0] for k in got.report.skipped} == {'visual_encoder_m', 'text_encoder_m', 'vision_proj_m', 'text_proj_m', 'image_queue', 'text_queue', 'queue_ptr', 'text_encoder'}


def test_sizes_are_inferred_and_given_ones_must_fit():
    state = official()
    config = infer_config(state, heads=HEADS)
    assert (config.image_size, config.patch_size, config.channels, config.vision_width, config.vision_layers, config.vision_intermediate) == (PATCH*SIDE, PATCH, 3, SEE, 2, 2*SEE)
    assert (config.vocab_size, config.max_length, config.text_width, config.text_layers, config.fusion_layers, config.text_intermediate, config.projection_dim) == (WORDS, LENGTH, READ, HALF, LAYERS - HALF, 3*READ, D)
    assert load_albef(state, config).model.config == config
    with pytest.raises(DataError, match=r'vision_proj.weight is \(16, 24\) in the checkpoint and \(8, 24\) in the model.*config=None'): load_albef(state, dataclasses.replace(config, projection_dim=8), queue=False)
    with pytest.raises(DataError, match=r'word_embeddings.weight is \(40, 32\) in the checkpoint and \(41, 32\)'): load_albef(state, dataclasses.replace(config, vocab_size=41))
    with pytest.raises(DataError, match='pass heads='): infer_config(state)
    with pytest.raises(DataError, match='no checkpoint in'): infer_config({'a': torch.zeros(1)})
    with pytest.raises(DataError, match='no checkpoint in'): load_albef({'a': torch.zeros(1)}, config)
    with pytest.raises(ValueError, match='pass one of them'): load_albef(state, config, image_size=32)
    with pytest.raises(DataError, match='width 7'): load_albef(state | dict(image_queue=torch.zeros(7,3), text_queue=torch.zeros(7,3)), heads=HEADS)


def test_a_depth_mismatch_is_reported_not_hidden():
    state, config = official(momentum=False, queue=False), infer_config(official(), heads=HEADS)
    more = load_albef(state, dataclasses.replace(config, vision_layers=3)).report
    assert len(more.missing) == 12 and all(k.startswith('visual_encoder.blocks.2.') for k in more.missing)
    less = load_albef(state, dataclasses.replace(config, fusion_layers=1)).report
    assert len(less.unexpected) == 26 and all(k.startswith('text_encoder.bert.encoder.layer.3.') for k in less.unexpected)
    assert '12 missing in the source, so fresh' in str(more) and '... and 6 more' in str(more) and '26 unexpected' in str(less)


def test_position_embeddings_are_interpolated():
    state = official()
    got = load_albef(state, heads=HEADS, image_size=PATCH*5)
    assert got.report.resized == ('visual_encoder.pos_embed (1, 10, 24) -> (1, 26, 24)', 'visual_encoder_m.pos_embed (1, 10, 24) -> (1, 26, 24)')
    for model, m in ((got.model, ''), (got.momentum, '_m')):
        old, new = state[f'visual_encoder{m}.pos_embed'], model.vision.embeddings.position_embeddings
        assert_close(new[:,0], old[:,0])
        for channel in (0, 7):                                                     # each channel is a picture of SIDE x SIDE
            assert_close(new[0,1:,channel].view(5, 5), F.interpolate(old[0,1:,channel].view(1, 1, SIDE, SIDE), size=(5, 5), mode='bicubic', align_corners=False)[0,0])
    assert torch.isfinite(got.model.encode_image(torch.randn(2, 3, PATCH*5, PATCH*5))).all()
    assert resize_positions(state['visual_encoder.pos_embed'], SIDE) is state['visual_encoder.pos_embed']
    with pytest.raises(DataError, match='square'): load_albef(state | {'visual_encoder.pos_embed': torch.zeros(1, 9, SEE)}, infer_config(state, heads=HEADS))
    half = resize_positions(state['visual_encoder.pos_embed'].bfloat16(), 6)
    assert half.dtype == torch.bfloat16 and half.shape == (1, 37, SEE)


def test_tied_decoder():
    state = official(momentum=False)
    word, decoder, bias, head_bias = (f'text_encoder.{x}' for x in ('bert.embeddings.word_embeddings.weight', 'cls.predictions.decoder.weight', 'cls.predictions.bias', 'cls.predictions.decoder.bias'))
    for gone in ((word,), (decoder,), (bias,), (head_bias,), (decoder, head_bias)):                  # one of two is enough
        if word in gone: config = infer_config(state, heads=HEADS)
        else: config = None
        got = load_albef({k: x for k, x in state.items() if k not in gone}, config, heads=HEADS)
        assert not got.report.missing
        assert_close(got.model.text.bert.embeddings.word_embeddings.weight.data, state[word]); assert_close(got.model.text.cls.predictions.decoder.bias.data, state[bias])
    model = got.model
    assert model.text.cls.predictions.decoder.weight is model.text.bert.embeddings.word_embeddings.weight and model.text.cls.predictions.decoder.bias is model.text.cls.predictions.bias
    with pytest.raises(DataError, match='shares them'): load_albef(state | {decoder: state[decoder] + 1}, heads=HEADS)


def test_fine_tuned_naming_and_ids_of_its_queue():
    state = {k.replace('.bert.', '.'): x for k, x in official().items() if '.cls.' not in k} | dict(idx_queue=torch.tensor([[3, 3, 5] + [-100]*7]), **{'text_decoder.bert.embeddings.LayerNorm.bias': torch.zeros(3)})
    got = load_albef(state, heads=HEADS)
    assert got.report.unexpected == ('text_decoder.bert.embeddings.LayerNorm.bias',)
    assert len(got.report.missing) == 12 and all('cls.predictions' in k and 'decoder.weight' not in k for k in got.report.missing)
    assert (got.queue.queue_ids == -1).all() and 'idx_queue' in got.report.skipped
    assert load_albef(state, heads=HEADS, keep_ids=True).queue.queue_ids.tolist() == [3, 3, 5] + [-1]*7
    images, texts = inputs()
    with torch.no_grad(): assert_close(got.model.encode_text(texts), load_albef(official(), heads=HEADS).model.encode_text(texts))


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_round_trip_through_the_official_naming(tmp_path, suffix):
    state = official()
    got = load_albef(state, heads=HEADS)
    again = official_state_dict(got.model, got.momentum, got.queue)
    assert set(again) == set(state)
    for k, x in state.items(): assert_close(again[k], x, rtol=0, atol=0, check_dtype=True, msg=k)
    path = save_albef(tmp_path/f'sub/albef.{suffix}', got.model, got.momentum, got.queue)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for k, x in read_tensors(path).items(): assert_close(x, state[k], rtol=0, atol=0)
    fresh = Queue(8, D).enqueue_(torch.ones(3, D)/4, torch.ones(3, D)/4, torch.tensor([1, 1, 2]))      # partly filled
    kept = load_albef(official_state_dict(got.model, None, fresh), heads=HEADS, keep_ids=True)
    for k, x in fresh.state_dict().items(): assert_close(kept.queue.state_dict()[k], x)
    assert len(load_albef(official_state_dict(got.model, None, Queue(8, D)), heads=HEADS).queue) == 0


def test_files_with_code_are_refused(tmp_path):
    torch.save(dict(model=official(False, False), args=AlbefConfig()), tmp_path/'code.pth')
    with pytest.raises(DataError, match='would run code'): load_albef(tmp_path/'code.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(DataError, match='must hold a state dict.*list'): load_albef(tmp_path/'list.pth')


def test_official_names_cover_the_model():
    for config in (albef_tiny, AlbefConfig(vision=dict(model_type='vit', hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4))):
        parts = [p for parts in official_names(config).values() for p in parts]
        assert sorted(parts) == sorted(AlbefModel(config).state_dict())


# towers

SMALL = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel
    root = tmp_path_factory.mktemp('towers'); seed_everything(0)
    halves = dict(text_config=dict(vocab_size=50, bos_token_id=0, eos_token_id=49, num_hidden_layers=1, **SMALL), vision_config=dict(image_size=16, patch_size=8, num_hidden_layers=2, **SMALL))
    models = dict(vit=ViTModel(ViTConfig(image_size=16, patch_size=8, num_hidden_layers=2, **SMALL)), clip=CLIPModel(CLIPConfig(**halves)), clip_vision=CLIPVisionModel(CLIPVisionConfig(**halves['vision_config'])),
                  bert=BertForMaskedLM(BertConfig(vocab_size=WORDS, num_hidden_layers=LAYERS, max_position_embeddings=LENGTH, **SMALL)), headless=BertModel(BertConfig(vocab_size=WORDS, num_hidden_layers=LAYERS, max_position_embeddings=LENGTH, **SMALL)))
    for name, model in models.items():
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.05*torch.randn(p.shape))
        model.eval().save_pretrained(root/name)
    return root, models


@pytest.mark.parametrize('vision', ['vit', 'clip', 'clip_vision'])
@pytest.mark.parametrize('bert', ['bert', 'headless'])
@torch.no_grad()
def test_towers_do_what_they_did(folders, vision, bert):
    root, models = folders
    model, momentum, queue, report = albef_from_towers(str(root/vision), str(root/bert), projection_dim=D, dropout=0.)
    assert momentum is None and queue is None and not model.training and (model.config.text_layers, model.config.fusion_layers) == (2, 2)
    pixels, (_, texts) = torch.randn(5, 3, 16, 16), inputs()
    tower, reader = getattr(models[vision], 'vision_model', models[vision]), getattr(models[bert], 'bert', models[bert])
    expected = tower(pixel_values=pixels).last_hidden_state
    assert_close(model.image_states(pixels), expected if vision == 'vit' else tower.post_layernorm(expected))
    assert_close(model.text_states(texts), reader(**texts, output_hidden_states=True).hidden_states[2])
    for i in (2, 3):
        for k, x in reader.encoder.layer[i].state_dict().items(): assert_close(model.fusion.layers[i-2].state_dict()[k], x)
    head = [k for k in report.missing if 'cls.predictions' in k]
    assert bool(head) == (bert == 'headless') and 'text.cls.predictions.decoder.weight' not in report.missing
    assert {k.partition('.')[0] for k in report.missing if k not in head} == {'fusion', 'image_projection', 'text_projection', 'match_head', 'temperature'}
    assert all('crossattention' in k for k in report.missing if k.startswith('fusion')) and sorted(report.loaded + report.missing) == sorted(model.state_dict())
    assert sorted(report.unexpected) == (['text: pooler.dense.bias', 'text: pooler.dense.weight'] if bert == 'headless' else []) + (['vision: pooler.dense.bias', 'vision: pooler.dense.weight'] if vision == 'vit' else [])
    if bert == 'bert': assert_close(model.token_logits(expected), models['bert'].cls(expected))


@pytest.mark.parametrize('vision', ['vit', 'clip'])
def test_towers_at_another_size_saved_and_trained(folders, tmp_path, vision):
    root, models = folders
    model, *_, report = albef_from_towers(str(root/vision), str(root/'bert'), image_size=32, text_layers=1, dropout=0.)
    assert len(report.resized) == 1 and '-> ' in report.resized[0] and (model.config.text_layers, model.config.fusion_layers) == (1, 3)
    images, (_, texts) = torch.randn(5, 3, 32, 32), inputs()
    check_gradients(model, images, texts)
    back = AlbefModel.from_pretrained(model.save_pretrained(tmp_path))
    with torch.no_grad():
        for a, b in zip(model.eval()(images, texts), back(images, texts)): assert_close(a, b, rtol=0, atol=0)
    if vision == 'clip':
        with pytest.raises(ValueError, match='plain ViT'): official_state_dict(model)
    else: assert_close(load_albef(official_state_dict(model), model.config).model.encode_image(images), back.encode_image(images))


def test_wrong_folders_are_refused(folders):
    root, _ = folders
    with pytest.raises(DataError, match='needs a ViT'): albef_from_towers(str(root/'bert'), str(root/'bert'))
    with pytest.raises(DataError, match='must hold a BERT'): albef_from_towers(str(root/'vit'), str(root/'clip'))
    with pytest.raises(ValueError, match='from 1 to 3'): albef_from_towers(str(root/'vit'), str(root/'bert'), text_layers=0)


# the model

def three_losses(model, images, texts):
    mask, n = texts['attention_mask'], len(images)
    seen, read = model.image_states(images), model.text_states(texts)
    itc = infonce(model.project_image(seen), model.project_text(read), model.logit_scale)
    fused = model.fuse(torch.cat([read, read.roll(1, 0)]), torch.cat([mask, mask.roll(1, 0)]), torch.cat([seen, seen]))
    itm = F.cross_entropy(model.match_logits(fused), (torch.arange(2*n) < n).long())
    return itc, itm, F.cross_entropy(model.token_logits(fused[:n,1]), texts['input_ids'][:,1])


def check_gradients(model, images, texts):
    model.train(); model.zero_grad()
    sum(three_losses(model, images, texts)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum() > 0]


def tiny_inputs(n=6, seed=1):
    _, texts = inputs(n, seed=seed)
    return torch.randn(n, 32*4*4, generator=make_generator(seed)), texts


def test_gradients_reach_every_parameter():
    seed_everything(0)
    check_gradients(AlbefModel(), *tiny_inputs())
    check_gradients(load_albef(official(), heads=HEADS).model, *inputs())


@pytest.mark.parametrize('extra', [1, 20])
@torch.no_grad()
def test_padding_changes_nothing(extra):
    seed_everything(0)
    model, (images, texts) = AlbefModel().eval(), tiny_inputs()
    ids, mask = texts['input_ids'], texts['attention_mask']
    longer = dict(input_ids=torch.cat([ids.masked_fill(mask == 0, 31), torch.full((6,extra), 99)], 1), attention_mask=F.pad(mask, (0, extra)))
    a, b = (model.fuse(model.text_states(t), t['attention_mask'], model.image_states(images)) for t in (texts, longer))
    close = lambda x, y: assert_close(x, y, atol=1e-5, rtol=1e-5)
    close(model.encode_text(texts), model.encode_text(longer)); close(model.match_logits(a), model.match_logits(b)); close(a[mask.bool()], b[:,:9][mask.bool()])
    for i in range(6):                                                                               # alone and without its padding
        cut = {k: x[i:i+1,:int(mask[i].sum())] for k, x in texts.items()}
        close(model.encode_text(cut)[0], model.encode_text(texts)[i]); close(model.match_logits(model.fuse(model.text_states(cut), None, model.image_states(images[i:i+1])))[0], model.match_logits(a)[i])


def test_bfloat16_autocast():
    seed_everything(0)
    model, (images, texts) = AlbefModel(), tiny_inputs()
    whole = three_losses(model, images, texts)
    with torch.autocast('cpu', torch.bfloat16):
        out, short = model(images, texts), three_losses(model, images, texts)
    assert out.image_features.dtype == out.text_features.dtype == torch.float32; assert_close(out.image_features.norm(dim=1), torch.ones(6))
    for a, b in zip(whole, short): assert_close(a, b.float(), atol=0.1, rtol=0.05)
    sum(short).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_temperature_is_clamped():
    model = AlbefModel()
    for value, kept in ((-1., 0.001), (0., 0.001), (0.03, 0.03), (0.5, 0.5), (9., 0.5)):
        with torch.no_grad(): model.temperature.fill_(value)
        before = model.temperature
        model.clamp_scale_()
        assert model.temperature is before and before.requires_grad
        assert_close(model.temperature.item(), kept, rtol=1e-6, atol=0); assert_close(model.logit_scale.item(), 1/kept, rtol=1e-5, atol=0)
    assert not AlbefModel(AlbefConfig(learn_scale=False)).temperature.requires_grad


def test_saved_and_loaded(tmp_path):
    seed_everything(0)
    model, (images, texts) = AlbefModel(AlbefConfig(dropout=0.1)), tiny_inputs()
    model.save_pretrained(tmp_path/'a')
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['config.json', 'model.safetensors']
    back = AlbefModel.from_pretrained(tmp_path/'a')
    assert not back.training and back.config == model.config
    assert {k: x.tolist() for k, x in back.state_dict().items()} == {k: x.tolist() for k, x in model.state_dict().items()}
    with torch.no_grad():
        for a, b in zip(model.eval()(images, texts), back(images, texts)): assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(DataError, match='another kind'): DualEncoder.from_pretrained(tmp_path/'a')
    with pytest.raises(DataError, match='another kind'): AlbefModel.from_pretrained(DualEncoder(DualEncoderConfig()).save_pretrained(tmp_path/'b'))
    config = json.loads((tmp_path/'a/config.json').read_text())
    (tmp_path/'a/config.json').write_text(json.dumps(config | dict(fusion_layers=3)))
    with pytest.raises(DataError, match='not those of the configuration'): AlbefModel.from_pretrained(tmp_path/'a')
    (tmp_path/'a/model.safetensors').write_bytes(b'torn')
    with pytest.raises(DataError, match='not those of the configuration'): AlbefModel.from_pretrained(tmp_path/'a')
    (tmp_path/'a/model.safetensors').unlink()
    with pytest.raises(DataError, match='model.safetensors is missing'): AlbefModel.from_pretrained(tmp_path/'a')


def test_momentum_copy_stays_tied_and_has_every_head():
    model = AlbefModel(); slow = momentum_copy(model)
    assert slow.text.cls.predictions.decoder.weight is slow.text.bert.embeddings.word_embeddings.weight is not model.text.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        for p in model.parameters(): p.add_(1.)
    momentum_update_(model, slow, 0.5)
    for a, b in zip(model.parameters(), slow.parameters()): assert_close(a - b, torch.full_like(a, 0.5))


@pytest.mark.parametrize('dropout, same', [(0., True), (0.3, False)])
def test_dropout_is_configurable(dropout, same):
    model, (images, texts) = AlbefModel(AlbefConfig(dropout=dropout, vision_dropout=dropout)).train(), tiny_inputs()
    run = lambda: model.fuse(model.text_states(texts), texts['attention_mask'], model.image_states(images))
    assert torch.equal(run(), run()) == same and torch.equal(model.eval()(images, texts).text_features, model(images, texts).text_features)


def test_grids_flat_or_not_and_wrong_shapes():
    model, (images, texts) = AlbefModel().eval(), tiny_inputs()
    assert_close(model.image_states(images), model.image_states(images.view(-1, 32, 4, 4)))
    for wrong in (images[:,:-1], images.view(-1, 16, 8, 4), images[0]):
        with pytest.raises(ValueError, match='images must be'): model.image_states(wrong)
    with pytest.raises(ValueError, match='T at most 32'): model.text_states(dict(input_ids=torch.ones(2, 33, dtype=torch.long)))
    with pytest.raises(ValueError, match='siglip'): AlbefModel(AlbefConfig(vision=dict(model_type='siglip_vision_model')))


def test_the_papers_size():
    "ALBEF, section 3.1: a BERT-base of 123.7M parameters and a ViT-B/16 of 85.8M."
    counts = parameter_counts(albef_base)
    assert round(counts['vision']/1e5) == 858 and round((counts['text.bert'] + counts['text.cls'] + counts['fusion'])/1e5) == 1237

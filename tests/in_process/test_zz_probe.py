import json, struct
import torch, comfy.model_base, comfy.supported_models, comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from concepts_pack.host.cross_attention import cross_attentions, sizes
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.file import to_bytes
from concepts_pack.perfusion.inline import to_text
from concepts_pack.perfusion.train import EditRecipe
from concepts_pack.textual_inversion.concept import Concept, Word
from dataclasses import asdict
import inspect
SD={"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,"num_heads":8,
    "adm_in_channels": None,"device":"meta","dtype":torch.float32,"operations":comfy.ops.disable_weight_init}
XL=SD|{"num_res_blocks":[2,2,2],"channel_mult":[1,2,4],"transformer_depth":[0,0,2,2,10,10],"transformer_depth_output":[0,0,0,2,2,2,10,10,10],"transformer_depth_middle":10,"context_dim":2048,"num_classes":"sequential","adm_in_channels":2816,"use_linear_in_transformer":True,"num_heads":-1,"num_head_channels":64}
def test_x():
    for cfg,words in ((SD,{"clip_l":768}),(XL,{"clip_l":768,"clip_g":1280})):
        u=UNetModel(**cfg)
        s={n:a.to_v.out_features for n,a in cross_attentions(u).items()}
        d=cfg["context_dim"]
        e=Edit(torch.randn(d),torch.randn(d),{n:torch.randn(k) for n,k in s.items()},encoder="0"*64)
        from concepts_pack.textual_inversion import templates
        c=Concept((Word("<mine>","cat",{k:torch.randn(1,w) for k,w in words.items()}),),e,{"modelspec.sai_model_spec":"1.0.1","modelspec.architecture":"SD15/perfusion","modelspec.base_model":"SD15","modelspec.title":"mine","concepts.training":json.dumps(asdict(EditRecipe("<mine>","cat",200,0.0052,4,0))|{"photos":5,"side":512,"steps_done":200},sort_keys=True)})
        b=to_bytes(c); n=struct.unpack("<Q",b[:8])[0]
        print(len(s), sum(s.values()), len(b), n, len(b)-n-8, len(to_text(c)))
        print(b[8:400])
    print(inspect.signature(EditRecipe))
    print(list(s)[:3])

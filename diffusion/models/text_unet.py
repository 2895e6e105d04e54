"""A U-Net and the text encoder that is trained, or runs, along with it."""

from torch import Tensor, nn

from .clip import CLIPTextModel
from .cond import Cond
from .sd_unet import SDUNet


class TextUNet(nn.Module):
    """Predict from x (B, C, H, W), t (B,) and cond.context, here the ids (B, L) of a text.

    skip: which layer of the text encoder is read, from the end; 1 is the last.
    """

    def __init__(self, unet: SDUNet, text: CLIPTextModel, skip: int = 1):
        super().__init__()
        self.unet = unet
        self.text = text
        self.skip = skip

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.unet(x, t, cond._replace(context=self.text(cond.context, self.skip)))


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name the networks that a trained module consists of, as adapter files do."""
    if isinstance(model, TextUNet):
        return {"unet": model.unet, "text_encoder": model.text}
    return {"unet": model}

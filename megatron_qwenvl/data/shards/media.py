"""Images, films and sound that this package does not read, known by their suffix or first bytes."""

from __future__ import annotations

import re

MEDIA_SUFFIXES = frozenset(
    # images, among them all that Pillow registers but those of data (HDF5, GRIB, BUFR)
    "apng avif avifs bay blp bmp2 bpg bw cin cr2 cr3 crw cur dcm dcr dcx dds dib djv djvu dng dpx emf emz eps "
    "epsf epsi erf exr fff fit fits flc fli flif fpx ftc ftu gbr hdr heic heics heif heifs hif icb icns ico "
    "ief iff iim im j2c j2k jbig jbig2 jls jng jp2 jpc jpf jpg2 jph jpm jpx jxl jxr kdc mng mpo mrw msp nef "
    "nrw orf palm pam pbm pcd pct pcx pdf pef pfm pgm pic pict pnm ppm ps psb psd pxr qoi raf ras raw rgb rgba "
    "rgbe rw2 rwl sgi sr2 srf srw svg svgz tga tif8 vda vst wbmp wdp wmf wmz x3f xbm xcf xpm xwd "
    # films and sound
    "3g2 3gp 3gpp 3gpp2 aac ac3 adts aif aifc aiff amr ape asf au avi caf divx f4v flac flv loas m1v m2ts m2v m4a m4b "
    "m4v mid midi mj2 mjpeg mjpg mkv mov movie mp2 mp3 mp4 mpa mpe mpeg mpg mts mxf oga ogg ogm ogv opus qt ra rm rmvb "
    "snd vob wav weba webm wma wmv wv y4m".split()
)
COMPRESSED_SUFFIXES = frozenset("7z br bz2 gz gzip lz lz4 lzma lzo rar xz z zip zst zstd".split())

_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....(?:WEBP|AVI |WAVE)|(?:II|MM)(?:\*\0|\0\*|\+\0|\0\+)|II\xbc\x01"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"  # a bitmap with the size of a known header
    rb"|[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0"  # and without its first header
    rb"|....ftyp|....jP  |\0\0\0\x0cJXL |\xff\x0a|\xff\x4f\xff\x51"  # HEIC, AVIF, MP4, JPEG 2000, JPEG XL
    rb"|8BPS|%!PS|\xc5\xd0\xd3\xc6|%PDF|\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF|qoif|DDS |icns|BLP[12]|DanM|LinS|FLIF"
    rb"|Image type: |gimp xcf|.{20}GIMP|BPG\xfb|[\x8a\x8b][MJ]NG|AT&TFORM|FTEX|FTU\0|/\* XPM \*/"
    rb"|\x59\xa6\x6a\x95|\xb1\x68\xde\x3a|\x80\xe8\0\0|\x76\x2f\x31\x01|#\?(?:RADIANCE|RGBE)"
    rb"|SIMPLE  =|P7 332|P7\nWIDTH|.{128}DICM"
    rb"|P[1-6Ff]\s+(?:#[^\n]*\n\s*)*[0-9]+\s+[0-9]+\s|\s*#define[ \t]+\w*_width[ \t]+[0-9]"
    rb"|\x0a[\0-\x05]\x01[\x01\x02\x04\x08]|\x01\xda[\0\x01][\x01\x02]\0"  # PCX, SGI
    rb"|....[\x11\x12]\xaf.{8}[\0\x03]\0|\0\0[\x01\x02]\0[^\0]\0...\0"  # FLI; icons and cursors
    rb"|\x1a\x45\xdf\xa3|\x30\x26\xb2\x75\x8e\x66\xcf\x11|OggS|fLaC|ID3[\x02-\x04]|FLV\x01|\.snd|MThd|FORM....AIF[FC]"
    rb"|#!AMR|\0\0\x01[\xb3\xba]|G.{187}G.{187}G"  # MPEG
    rb"|/9j/4|iVBORw0KGgo|data:image/"  # JPEG and PNG as base64
    rb"|(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,400}|<!--.{0,400}|<!DOCTYPE svg.{0,400})?<svg[\s>:]",
    re.DOTALL,
)
STARTS_WITHIN = 512
"""Number of bytes at the beginning of a file in which `begins_like_media` looks."""


def has_media_suffix(name: str) -> bool:
    """Whether the last suffix (of `mp4`, `0.heic`) is one of these."""
    return name.lower().rpartition(".")[2] in MEDIA_SUFFIXES


def without_compression(name: str) -> str:
    """Return the suffix below those of compression: `0.jpg` of `0.jpg.gz`; the name itself if it has none."""
    stem, _, last = name.rpartition(".")
    return without_compression(stem) if stem and last.lower() in COMPRESSED_SUFFIXES else name


def begins_like_media(start: bytes) -> bool:
    """Whether the first bytes of a file are those of an image, a film or sound, whatever its name."""
    return _STARTS.match(start) is not None

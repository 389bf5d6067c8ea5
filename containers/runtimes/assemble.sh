# Runs inside the image under construction, without network: installs exactly the wheels that lie in /wheels.
set -eu
export HOME=/tmp NO_COLOR=1 PYTHONDONTWRITEBYTECODE=1 UV_CACHE_DIR=/opt/cache UV_OFFLINE=1 UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS=never
${python} -m zipfile -e /wheels/installer/uv-*.whl /opt/installer
uv=$(echo /opt/installer/uv-*.data/scripts/uv)
chmod +x "$uv"
"$uv" venv -q --python "$(command -v ${python})" /opt/venv
# One file system for cache and environment: hard links, so that nothing is written twice.
"$uv" pip install -q --python /opt/venv/bin/python --no-index --no-deps --link-mode hardlink /wheels/*.whl
cd /opt/venv/lib/${python}/site-packages
rm -rf ${omit}
# Linux gives a processor's matrix registers (AMX) to a process that asks: arch_prctl (158), ARCH_REQ_XCOMP_PERM (0x1023),
# XTILEDATA (18). vLLM 0.32 asks too late, so that a short first prompt to an unquantized model ends the engine (SIGILL).
# Where there is no AMX the call does nothing.
echo 'import ctypes; ctypes.CDLL(None).syscall(158, 0x1023, 18)' > slipway_amx.pth
cp /slipway_torch.py .
echo 'import slipway_torch' > slipway_torch.pth
if ${cpu_kernels}; then
  cp -r /slipway_kernels .
  mkdir slipway_kernels-1.dist-info
  printf 'Metadata-Version: 2.1\nName: slipway-kernels\nVersion: 1\n' > slipway_kernels-1.dist-info/METADATA
  printf '[vllm.general_plugins]\nslipway_kernels = slipway_kernels:register\n' > slipway_kernels-1.dist-info/entry_points.txt
fi
# A read-only container can't keep what it compiles: without this every start compiles thousands of modules again.
/opt/venv/bin/python /compile.py .
${describe}
# vLLM writes its descriptions for their owner alone, and another user reads them.
chmod -R a+rX /opt/venv/share 2>/dev/null || true
# When and from where a wheel was installed is nobody's business, and differs from run to run.
rm -f ./*.dist-info/uv_cache.json
sed -i '/\/uv_cache\.json,/d' ./*.dist-info/RECORD

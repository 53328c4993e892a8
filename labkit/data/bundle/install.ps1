# Installs labkit from this folder without a network: powershell -ExecutionPolicy Bypass -File install.ps1 [PYTHON]
param([string]$Python = "python")
$ErrorActionPreference = "Stop"
& $Python (Join-Path $PSScriptRoot "install.py")
exit $LASTEXITCODE

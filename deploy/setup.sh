#!/bin/sh
# Installs what is missing of what the build and the tests need. Changes nothing that is there.
# usage: deploy/setup.sh build [test]
set -eu

need_package() { # need_package COMMAND DEBIAN_PACKAGE...
    command=$1
    shift
    if command -v "$command" >/dev/null 2>&1; then
        return 0
    fi
    install_packages "$command" "$@"
}

install_packages() { # install_packages WHAT DEBIAN_PACKAGE...
    command=$1
    shift
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "error: $command is missing, and this is no Debian: install it (Debian packages: $*)" >&2
        exit 1
    fi
    echo "setup: installing $* for $command"
    sudo=
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

# What tests the API by its description. Without it that test says that it is skipped.
need_schemathesis() {
    made=${XDG_CACHE_HOME:-$HOME/.cache}/farfork/schemathesis
    if [ -x "$made/bin/st" ] && [ "$(cat "$made/farfork-version" 2>/dev/null)" = "$SCHEMATHESIS_VERSION" ]; then
        return 0
    fi
    if ! python3 -c 'import ensurepip, venv' >/dev/null 2>&1; then
        install_packages "python3 -m venv" python3-venv
    fi
    echo "setup: installing schemathesis $SCHEMATHESIS_VERSION into $made"
    # Made anew: half of one from a time that was cut off is none.
    rm -rf "$made"
    mkdir -p "$(dirname "$made")"
    if ! { python3 -m venv "$made" && "$made/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$SCHEMATHESIS_VERSION"; }; then
        rm -rf "$made"
        echo "setup: schemathesis cannot be had (PyPI is not reached?): the test of the API by its description will be SKIPPED" >&2
        return 0
    fi
    echo "$SCHEMATHESIS_VERSION" >"$made/farfork-version"
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "error: cargo is missing: install Rust 1.95 or newer with rustup" >&2
    exit 1
fi

for what in "$@"; do
    case $what in
    build)
        need_package cc gcc libc6-dev
        need_package git git
        # For the bindings of userfaultfd, which are generated when it is built.
        if ! ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* 2>/dev/null | grep -qv cpp &&
            [ -z "${LIBCLANG_PATH:-}" ]; then
            install_packages libclang libclang-dev
        fi
        ;;
    test)
        if ! cargo nextest --version >/dev/null 2>&1; then
            echo "setup: building cargo-nextest $NEXTEST_VERSION, which takes some minutes once"
            cargo install --locked --quiet --version "$NEXTEST_VERSION" cargo-nextest
        fi
        # Hosts of the tests are network namespaces, if this is root.
        [ "$(id -u)" -ne 0 ] || need_package ip iproute2
        need_schemathesis
        ;;
    *)
        echo "usage: deploy/setup.sh build [test]" >&2
        exit 2
        ;;
    esac
done

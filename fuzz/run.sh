#!/bin/sh
# Fuzzes every target for FUZZ_SECONDS (60) each, from its corpus. New inputs go to fuzz/found, crashes to fuzz/artifacts.
# A target alone: fuzz/run.sh head. Needs a C++ compiler; works with the stable toolchain, and with cargo-fuzz as well.
set -eu
cd "$(dirname "$0")"
command -v c++ >/dev/null 2>&1 || { echo "error: a C++ compiler is missing (Debian package g++)" >&2; exit 1; }
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions"
cargo build --quiet --release --target "$host"
for target in ${*:-head hash_page image_file machine_state from_worker to_worker virtio kernel page_request page_answer certificate \
    order order_answer about_image from_agent join join_token raft_message job_file job_payload job_outputs kept_files}; do
    mkdir -p "found/$target" "artifacts/$target"
    echo "fuzzing $target for ${FUZZ_SECONDS:=60} s"
    "target/$host/release/$target" "found/$target" "corpus/$target" -max_total_time="$FUZZ_SECONDS" -max_len=70000 \
        -rss_limit_mb=2048 -artifact_prefix="artifacts/$target/" -print_final_stats=1 2>&1 | tail -n 8
done

//! A holder for the tests that attack one: it lets every peer read everything that it trusts, and says how it is.
//!
//! `holder CERTIFICATE...` trusts these PEM files, prints its address and its certificate, and then answers each line of its
//! input by one line: the most bytes that were resident, and its counters. It ends with its input.
#![forbid(unsafe_code)]

use std::io::BufRead;
use std::sync::Arc;
use std::time::Duration;

use pages::endpoint::{Limits, Tuning};
use pages::fakes::{MemoryImage, MemoryStore, OpenGate};
use pages::server::{NoOrders, Setup};
use pages::{Certificate, Identity, Role, Server, Trust};
use types::{NodeId, Tenant};
use uuid::Uuid;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let identity = Identity::generate(NodeId::from_uuid(Uuid::now_v7()), Role::Learner).expect("an identity");
    let trust = Trust::new();
    for path in std::env::args().skip(1) {
        let certificate = Certificate::from_pem(&std::fs::read(path).expect("a file")).expect("a certificate");
        trust.add(&certificate, [Tenant::default_tenant()]).expect("one more peer");
    }
    let image = MemoryImage::patterned(Tenant::default_tenant(), 1024);
    let digest = image.digest();
    let setup = Setup {
        listen: "127.0.0.1:0".parse().expect("an address"),
        identity: &identity,
        trust,
        store: Arc::new(MemoryStore::new(OpenGate, [image])),
        orders: Arc::new(NoOrders),
        services: Vec::new(),
        tuning: Tuning::default(),
        limits: Limits { answer_time: Duration::from_secs(2), ..Limits::default() },
    };
    let server = Server::start(setup).expect("a server");
    println!("{}", server.address());
    println!("{digest}");
    println!("{}", identity.certificate_pem());
    println!("ready");
    for _ in std::io::stdin().lock().lines() {
        println!("{} {:?}", peak_bytes(), server.counters());
    }
}

/// The most that was ever resident, so that nothing is missed between two questions.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

//! Nodes of another version, as far as they get.

use std::fs;
use std::time::Duration;

use bytes::Bytes;
use farfork::member::carrier::ALPN_RAFT;
use farfork::member::forward::ALPN_API;
use farfork::member::join::Reply;
use farfork::member::token::JoinToken;
use pages::client::Unasked;
use pages::endpoint::Tuning;
use pages::{Client, Identity, LinkError, Role, Root, Trust, join};
use types::NodeId;
use uuid::Uuid;

use super::stage::Cluster;
use crate::support::DEADLINE;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_join_request_of_another_version_is_told_so() {
    let mut cluster = Cluster::apart("versions", 2);
    cluster.begin(0);
    let token = cluster.token(0, "node-1", true);
    let parsed: JoinToken = token.parse().unwrap();
    let stranger = Identity::generate(NodeId::from_uuid(Uuid::now_v7()), Role::Learner).unwrap();
    // Whatever follows the version; and what has none.
    for (request, why) in
        [(&[2, 9, 9, 9][..], "version 2"), (&[0xFF; 4], "cannot be read"), (&[], "cannot be read"), (&[1], "cannot be read")]
    {
        let ask = || {
            let request = Bytes::copy_from_slice(request);
            block_on(join::ask(&stranger, parsed.addresses[0], parsed.fingerprint(), request, DEADLINE))
        };
        let answer = cluster.run_in(1, ask).unwrap();
        let Reply::Refused { message, remedy } = postcard::from_bytes(&answer).unwrap() else { panic!("{answer:?}") };
        assert!(message.contains(why) && remedy.contains("same version"), "{message}; {remedy}");
    }
    // The token is as good as before.
    assert_eq!(cluster.offline(1, &["cluster", "join", &token]).code, Some(0));
}

#[test]
fn members_that_speak_another_protocol_are_told_so_and_disturb_nobody() {
    let mut cluster = Cluster::new("protocols", 3, 3);
    let address = cluster.address(0).parse().unwrap();
    // A member, by its certificate, of a later version.
    cluster.crash(2);
    let data = cluster.directory(2).join("data");
    let read = |file: &str| fs::read(data.join(file)).unwrap();
    let identity = Identity::from_pem(&read("node.pem"), &read("node.key")).unwrap();
    let trust = Trust::new();
    trust.join(Root::from_pem(&read("ca.pem")).unwrap());
    let ask = |alpn: Vec<u8>| {
        let (identity, trust) = (&identity, &trust);
        let work = move || {
            block_on(async {
                let client = Client::new(identity, trust, &Tuning::default()).unwrap();
                let way = client.way(identity, &alpn, address, None, true).unwrap();
                way.ask(Bytes::from_static(&[0xFF; 64]), 1 << 20, Duration::from_secs(10)).await
            })
        };
        cluster.run_in(2, work)
    };
    for alpn in [ALPN_RAFT, ALPN_API] {
        let later = [&alpn[..alpn.len() - 1], b"2"].concat();
        let refused = ask(later);
        let Err(Unasked::NotSent(error)) = refused else { panic!("{refused:?}") };
        assert!(matches!(error, LinkError::OtherProtocol { .. }), "{error:?}");
        assert!(error.to_string().contains("does not speak") && error.remedy().contains("same version"), "{error}");
    }
    // Of this version it is answered, also when it talks nonsense.
    assert!(ask(ALPN_RAFT.to_vec()).is_ok());
    cluster.start(2);
    cluster.settles(3, 3);
}

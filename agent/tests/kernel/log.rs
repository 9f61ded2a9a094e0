//! The programs' debugging log.

use std::{fs, sync::Arc};

use agent_common::policy::{IMDS_DENY, IMDS_INTERCEPT, POD_IDENTITY_ON};
use tempfile::NamedTempFile;
use tracing::subscriber::with_default;

use crate::{
    IMDS, is_eperm,
    kernel_node::{Node, Pod},
    wire,
};

#[test]
fn the_debugging_log_never_shows_a_ticket() {
    Node::run(|node| {
        let file = NamedTempFile::new().unwrap();
        let writer = Arc::new(file.reopen().unwrap());
        let log =
            tracing_subscriber::fmt().with_env_filter("kernel=debug").with_ansi(false).with_writer(writer);
        let origin = with_default(log.finish(), || {
            node.reload(|_| {});
            let mut log = node.interceptor.debug_log().unwrap().expect("it is off");
            let [served, denied] =
                [IMDS_INTERCEPT, IMDS_DENY].map(|imds| node.pod(&imds.to_string(), imds, POD_IDENTITY_ON));
            let agent = node.agent();
            let _stream = served.connect(IMDS).unwrap();
            let origin = agent.accept().expect("anonymous");
            assert!(is_eperm(&denied.connect(IMDS)));
            wire::shake_hands(2_000, origin.ticket);
            assert_eq!(agent.accept(), None);

            log.flush();
            let text = fs::read_to_string(file.path()).unwrap();
            let open_connection = |pod: &Pod, what| {
                format!("DEBUG kernel: cgroup {}, ::ffff:169.254.169.254 port 80: {what}", pod.container.id)
            };
            let expected = [
                open_connection(&served, "redirected"),
                open_connection(&served, "ticket_sent"),
                open_connection(&served, "redeemed"),
                open_connection(&denied, "denied"),
                "DEBUG kernel: cgroup 0, ::ffff:10.9.9.9 port 2000: bad_ticket".to_owned(),
            ];
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), expected.len(), "{text}");
            for (line, expected) in lines.iter().zip(&expected) {
                assert!(line.ends_with(expected), "{line:?} instead of {expected:?}");
            }
            origin
        });
        let text = fs::read_to_string(file.path()).unwrap();
        for ticket in [format!("{}", origin.ticket), format!("{:x}", origin.ticket)] {
            assert!(!text.contains(&ticket), "{text}");
        }
    });
}

#[test]
fn without_being_asked_for_there_is_no_debugging_log() {
    Node::run(|node| {
        assert!(node.interceptor.debug_log().unwrap().is_none());
    });
}

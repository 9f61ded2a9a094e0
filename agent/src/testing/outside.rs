//! Everything that parses a byte from outside, each as one function of the bytes: it must not panic, whatever they are,
//! and what must hold in the end is asserted. The fuzz targets and the property tests call the same.
#![expect(
    clippy::missing_panics_doc,
    reason = "to panic where something does not hold is what these are for"
)]

use std::{convert::Infallible, fs, io, path::PathBuf, sync::OnceLock};

use agent_common::{net::Service, origin::Origin};
use hyper::{Method, Request, StatusCode, body::Incoming, http::request::Parts, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::Runtime,
};
use uuid::Uuid;

use super::{credentials, pod, pod_uid};
use crate::{
    credentials::{
        jwt::{self, signature::KeySet},
        token,
    },
    dialect::{
        Dialect, Refusal, Response, ecs,
        imds::{self, ReadPath},
        imds_token::ImdsTokens,
        pod_identity,
    },
    handover::wire,
    identity::{cgroup, pods::TOKEN_VOLUME},
    instance::Instance,
    intercept, maps,
    policy::{
        self, ANNOTATION_IMDS, ANNOTATION_IMDS_POD_OVERRIDE, ANNOTATION_IMDS_V1, ANNOTATION_POD_IDENTITY,
        ANNOTATION_TOKENLESS, Annotations, Defaults, ImdsMode, Place, Policy,
    },
    serve,
};

/// What may be on its way at once in a connection that is in memory.
const BUFFER: usize = 256 * 1024;
const ANNOTATIONS: [&str; 5] = [
    ANNOTATION_IMDS,
    ANNOTATION_IMDS_POD_OVERRIDE,
    ANNOTATION_POD_IDENTITY,
    ANNOTATION_IMDS_V1,
    ANNOTATION_TOKENLESS,
];
const MODES: [ImdsMode; 4] = [ImdsMode::Off, ImdsMode::Audit, ImdsMode::Intercept, ImdsMode::Deny];

/// A connection's bytes, as to each service and as to one that is not known. What is answered is HTTP, and only a request
/// that may have something gets it.
#[expect(clippy::expect_used, reason = "test code")]
pub fn http_head(bytes: &[u8]) {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
    });
    for dialled in [None, Some(Service::PodIdentity), Some(Service::Imds), Some(Service::Ecs)] {
        let answers = runtime.block_on(converse(dialled, bytes));
        assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."));
    }
}

async fn converse(dialled: Option<Service>, bytes: &[u8]) -> Vec<u8> {
    let (client, server) = duplex(BUFFER);
    let service = service_fn(move |request: Request<Incoming>| async move {
        Ok::<_, Infallible>(answer(dialled, &request.into_parts().0))
    });
    let server = serve::protocol().serve_connection(TokioIo::new(server), service);
    let (mut from, mut to) = tokio::io::split(client);
    let send = async {
        // The server may end the connection first.
        let _ = to.write_all(bytes).await;
        let _ = to.shutdown().await;
    };
    let mut answers = Vec::new();
    let receive = from.read_to_end(&mut answers);
    let _ = tokio::join!(server, send, receive);
    answers
}

fn answer(dialled: Option<Service>, head: &Parts) -> Response {
    let dialect = Dialect::pick(dialled, None, &head.headers, head.uri.path());
    let response = match dialect {
        Dialect::PodIdentity => pod_identity::ask(head, Timestamp::UNIX_EPOCH).map(|_| {
            assert_reads_credentials(head);
            pod_identity::credentials(&credentials())
        }),
        Dialect::Ecs => ecs::ask(head, Timestamp::UNIX_EPOCH).map(|_| {
            assert_reads_credentials(head);
            ecs::credentials(&credentials())
        }),
        Dialect::Imds => imds::ask(head).and_then(|ask| imds_answer(head, ask)),
    };
    response.unwrap_or_else(|refusal| {
        assert!(refusal.status.is_client_error(), "{refusal:?}");
        dialect.refuse(&refusal)
    })
}

fn assert_reads_credentials(head: &Parts) {
    assert!(head.uri.path().starts_with(pod_identity::PATH));
    assert!(matches!(head.method, Method::GET | Method::HEAD));
}

fn imds_answer(head: &Parts, ask: imds::Ask<'_>) -> Result<Response, Refusal> {
    match ask {
        imds::Ask::Token { ttl_secs } => {
            assert_eq!(head.method, Method::PUT);
            assert!((1..=21_600).contains(&ttl_secs));
            Ok(imds::token("token".to_owned(), ttl_secs))
        }
        imds::Ask::Read { path, .. } => {
            assert!(matches!(head.method, Method::GET | Method::HEAD));
            match path {
                ReadPath::Fact(fact) => imds::fact(fact, &Instance::default()),
                ReadPath::Listing(names) => Ok(imds::listing(names)),
                ReadPath::Other => Err(imds::nothing()),
                path => imds::own(path, &credentials()),
            }
        }
    }
    .inspect(|response| assert_eq!(response.status(), StatusCode::OK))
}

/// A service-account token. None is good that has no three segments, and no refusal quotes it at length.
pub fn jwt(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match jwt::read(&text, Timestamp::UNIX_EPOCH) {
        Ok(_) => assert!(text.len() <= jwt::MAX_LEN && text.matches('.').count() == 2),
        Err(error) => assert!(error.to_string().len() < 200),
    }
}

/// A JSON web key set, and after the first line break a token.
pub fn key_set(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (keys, token) = text.split_once('\n').unwrap_or((&text, ""));
    if let Ok(keys) = KeySet::parse(keys) {
        let verified = keys.verify(token);
        assert!(verified.is_err() || !keys.is_empty());
    }
}

/// A session token of IMDS. Nobody makes one without the key.
pub fn imds_token(bytes: &[u8]) {
    let tokens = ImdsTokens::new(&[7; 32]);
    assert!(!tokens.is_valid(&String::from_utf8_lossy(bytes), pod_uid(), Timestamp::UNIX_EPOCH));
}

/// The path of a cgroup below kubepods. Nothing below a pod changes whose it is.
pub fn cgroup_path(bytes: &[u8]) {
    let path = PathBuf::from(String::from_utf8_lossy(bytes).as_ref());
    let Some(found) = cgroup::parse(&path) else { return };
    assert!(path.starts_with(&found.pod) && found.pod.components().count() <= 2);
    let below = found.pod.join(path.file_name().unwrap_or_default());
    assert_eq!(cgroup::parse(&below), Some(found));
}

/// The kubelet's token file.
#[expect(clippy::expect_used, reason = "test code")]
pub fn kubelets_token(bytes: &[u8]) {
    let volume = std::env::temp_dir().join(format!("podgate-{}", Uuid::new_v4()));
    fs::create_dir(&volume).expect("a directory");
    fs::write(volume.join(TOKEN_VOLUME), bytes).expect("a file");
    let token = token::read_projected(&volume);
    fs::remove_dir_all(&volume).expect("the same directory");
    if let Ok(token) = token {
        assert!(token.expose().len() <= jwt::MAX_LEN && !token.expose().ends_with(char::is_whitespace));
        jwt(token.expose().as_bytes());
    }
}

/// Annotations: the operator's default and floor in the first byte, then lines with the values of the namespace's and the
/// pod's. Nothing goes below the floor, and the pod alone loosens nothing.
pub fn annotations(bytes: &[u8]) {
    let Some((first, values)) = bytes.split_first() else { return };
    let mode = |number: u8| MODES[usize::from(number & 3)];
    let defaults = Defaults { imds: mode(*first), imds_floor: mode(first >> 2), imds_v1: first & 16 != 0 };
    let text = String::from_utf8_lossy(values);
    let mut lines = text.split('\n');
    let mut of_place = || -> Annotations {
        ANNOTATIONS
            .iter()
            .zip(lines.by_ref())
            .filter(|(_, value)| *value != "-")
            .map(|(name, value)| ((*name).to_owned(), value.to_owned()))
            .collect()
    };
    let (namespace, of_pod) = (of_place(), of_place());
    for (annotations, place) in [(&namespace, Place::Namespace), (&of_pod, Place::Pod)] {
        for unreadable in policy::unreadable(annotations, place) {
            assert!(!unreadable.to_string().contains(char::is_control));
        }
    }
    let plain = pod("app", "web");
    let without = Policy::decide(&defaults, &namespace, &plain);
    let decided = Policy::decide(&defaults, &namespace, &super::Pod { annotations: of_pod, ..plain });
    assert!(decided.imds >= defaults.imds_floor);
    let may_loosen = namespace.get(ANNOTATION_IMDS_POD_OVERRIDE).is_some_and(|value| value == "true");
    assert!(may_loosen || decided.imds >= without.imds);
}

/// A record of the kernel's: an event, and an origin as it is on a socket.
#[expect(unsafe_code, reason = "the record comes as bytes")]
pub fn record(bytes: &[u8]) {
    if let Some((counter, event)) = intercept::decode(bytes) {
        let shown = format!("{} {:?} {}", counter.label(), event, serve::process(&event.comm, event.tgid));
        assert!(!shown.contains(char::is_control));
    }
    if bytes.len() == size_of::<Origin>() {
        // SAFETY: as long as an origin, which has no padding; every bit pattern is one.
        let origin = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<Origin>()) };
        let _ = (origin.orig_dst.service(), origin.orig_dst.ip(), origin.orig_dst.same(&origin.target));
        assert!(!serve::process(&origin.comm, origin.tgid).contains(char::is_control));
    }
}

/// Credentials as another agent hands them over: what is taken would be given on in the same way.
#[expect(clippy::expect_used, reason = "test code")]
pub fn handed_over(bytes: &[u8]) {
    if let Some(entries) = wire::decode(bytes) {
        let given = wire::encode(&entries).expect("JSON");
        assert_eq!(wire::decode(&given), Some(entries));
    }
}

/// The type information of a map, its length before it, and a value.
pub fn map_value(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (types, value) = rest.split_at(length);
    for number in 0..8 {
        let _ = maps::print_value(types, number, value, io::sink());
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Text as it comes in a head, where most bytes matter.
    fn head() -> impl Strategy<Value = String> {
        let line = "(GET|PUT|HEAD|POST) (http://169\\.254\\.170\\.23)?/(v1/credentials|latest/api/token|latest/meta-data/[a-z/-]{0,30})(\\?[a-z]{0,3})?";
        let header = "(Host|Authorization|X-aws-ec2-metadata-token(-ttl-seconds)?|Content-Length|Expect|Via): ?[ -~]{0,40}\r\n";
        (line, vec(header, 0..5))
            .prop_map(|(line, headers)| format!("{line} HTTP/1.1\r\n{}\r\n", headers.concat()))
    }

    /// A fuzz target's name, and its function.
    type Target = (&'static str, fn(&[u8]));

    const OUTSIDE: [Target; 10] = [
        ("annotations", annotations),
        ("cgroup_path", cgroup_path),
        ("handed_over", handed_over),
        ("http_head", http_head),
        ("imds_token", imds_token),
        ("jwt", jwt),
        ("key_set", key_set),
        ("kubelets_token", kubelets_token),
        ("map_value", map_value),
        ("record", record),
    ];

    /// What the fuzz targets begin with, and what they have found.
    #[test]
    fn every_seed_of_the_fuzz_targets_passes() {
        for (target, outside) in OUTSIDE {
            let seeds = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
            let seeds: Vec<_> = fs::read_dir(seeds).unwrap().map(|seed| seed.unwrap().path()).collect();
            assert!(!seeds.is_empty(), "{target}");
            for seed in seeds {
                outside(&fs::read(seed).unwrap());
            }
        }
    }

    proptest! {
        #[test]
        fn no_head_makes_a_dialect_panic(head in head()) {
            http_head(head.as_bytes());
        }

        #[test]
        fn no_bytes_are_too_odd(bytes in vec(any::<u8>(), 0..300)) {
            for (_, outside) in OUTSIDE {
                outside(&bytes);
            }
        }

        #[test]
        fn no_annotation_goes_below_the_floor(
            first: u8,
            values in vec("(-|on|off|audit|intercept|deny|allow|true|false|[a-z\u{0}-\u{1f}]{0,5})", 10),
        ) {
            let mut bytes = vec![first];
            bytes.extend(values.join("\n").bytes());
            annotations(&bytes);
        }

        #[test]
        fn no_record_of_the_kernel_is_too_odd(bytes in vec(any::<u8>(), size_of::<Origin>())) {
            record(&bytes);
        }
    }
}

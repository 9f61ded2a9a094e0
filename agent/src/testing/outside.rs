//! Everything that parses bytes from outside, each as one function of the bytes: it must not panic, and it asserts what
//! must hold of the result. The fuzz targets and the property tests call the same functions.
#![expect(clippy::missing_panics_doc, reason = "these panic where an assertion does not hold")]

use std::{convert::Infallible, fs, io, path::PathBuf, slice::Chunks, sync::OnceLock};

use agent_common::{net::Service, origin::Origin};
use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{HOST, HeaderName, HeaderValue, ORIGIN},
    http::request::Parts,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::Runtime,
};
use uuid::Uuid;

use super::{credentials, pod, pod_uid};
use crate::{
    credentials::{
        Role, token,
        token::{claims, jwks::KeySet},
    },
    dialect::{
        Dialect, Refusal, Response, ecs, forwarded,
        imds::{self, ReadPath},
        imds_token::ImdsTokens,
        is_forwarded, pod_identity,
    },
    identity::{Pod, TOKEN_VOLUME, cgroup},
    instance_metadata::Instance,
    intercept, mapdump,
    policy::{
        self, ANNOTATION_IMDS, ANNOTATION_IMDS_POD_OVERRIDE, ANNOTATION_IMDS_V1, ANNOTATION_POD_IDENTITY,
        ANNOTATION_TOKENLESS, AnnotationScope, Annotations, Defaults, ImdsMode, Policy, UnknownPods,
    },
    serve,
    takeover::transfer::wire,
};

/// The buffer of a connection in memory.
const BUFFER: usize = 256 * 1024;
const ANNOTATIONS: [&str; 5] = [
    ANNOTATION_IMDS,
    ANNOTATION_IMDS_POD_OVERRIDE,
    ANNOTATION_POD_IDENTITY,
    ANNOTATION_IMDS_V1,
    ANNOTATION_TOKENLESS,
];
const MODES: [ImdsMode; 4] = [ImdsMode::Off, ImdsMode::Audit, ImdsMode::Intercept, ImdsMode::Deny];

/// The bytes of a connection, to each service and to an unknown one. The first byte is the size of the pieces in which the
/// others arrive; 0 is all at once. Every response is HTTP with a length, and only a request that may have something gets
/// it.
#[expect(clippy::expect_used, reason = "test code")]
pub fn http_head(bytes: &[u8]) {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let Some((piece, bytes)) = bytes.split_first() else { return };
    let piece = if *piece == 0 { bytes.len().max(1) } else { usize::from(*piece) };
    let runtime = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
    });
    for orig_dst in [None, Some(Service::PodIdentity), Some(Service::Imds), Some(Service::Ecs)] {
        let answers = runtime.block_on(converse(orig_dst, bytes.chunks(piece)));
        assert!(answers.is_empty() || answers.starts_with("HTTP/1."));
        assert_eq!(answers.matches("HTTP/1.").count(), answers.matches("\r\nContent-Length: ").count());
    }
}

async fn converse(orig_dst: Option<Service>, pieces: Chunks<'_, u8>) -> String {
    let (client, server) = duplex(BUFFER);
    let service = service_fn(move |request: Request<Incoming>| async move {
        Ok::<_, Infallible>(answer(orig_dst, &request.into_parts().0))
    });
    let server = serve::protocol().serve_connection(TokioIo::new(server), service);
    let (mut from, mut to) = tokio::io::split(client);
    let send = async {
        for piece in pieces {
            // The server may close the connection first.
            if to.write_all(piece).await.is_err() {
                break;
            }
            // The server reads this before more is sent.
            tokio::task::yield_now().await;
        }
        let _ = to.shutdown().await;
    };
    let mut answers = Vec::new();
    let receive = from.read_to_end(&mut answers);
    let _ = tokio::join!(send, receive, server);
    String::from_utf8_lossy(&answers).into_owned()
}

fn answer(orig_dst: Option<Service>, head: &Parts) -> Response {
    let dialect = Dialect::pick(orig_dst, None, &head.headers, head.uri.path());
    let response = match dialect {
        Dialect::PodIdentity => pod_identity::parse(head, Timestamp::UNIX_EPOCH).and_then(|sent| {
            assert_reads_credentials(head, &["169.254.170.23", "fd00:ec2::23"]);
            check_direct(head, sent.is_some())?;
            Ok(pod_identity::credentials(&credentials()))
        }),
        Dialect::Ecs => ecs::parse(head, Timestamp::UNIX_EPOCH).and_then(|sent| {
            assert_reads_credentials(head, &["169.254.170.2"]);
            check_direct(head, sent.is_some())?;
            Ok(ecs::credentials(&credentials()))
        }),
        Dialect::Imds => imds::parse(head).and_then(|request| imds_answer(head, request)),
    };
    response.unwrap_or_else(|refusal| {
        assert!(refusal.status.is_client_error(), "{refusal:?}");
        dialect.refuse(&refusal)
    })
}

/// Asserts that path and method are right, and every host that the request names.
fn assert_reads_credentials(head: &Parts, addresses: &[&str]) {
    assert!(head.uri.path().starts_with(pod_identity::PATH));
    assert!(matches!(head.method, Method::GET | Method::HEAD));
    let mut named: Vec<_> = head.headers.get_all(HOST).iter().map(HeaderValue::as_bytes).collect();
    assert!(named.len() <= 1);
    named.extend(head.uri.authority().map(|authority| authority.as_str().as_bytes()));
    assert!(!named.is_empty());
    for host in named {
        let is_one = |address: &&str| {
            let bracketed = format!("[{address}]");
            let rest =
                [address.as_bytes(), bracketed.as_bytes()].iter().find_map(|form| host.strip_prefix(*form));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b":"))
        };
        assert!(addresses.iter().any(is_one), "{}", host.escape_ascii());
    }
}

/// A request without a token of either kind must not be forwarded: as in `serve`, and whatever the case of the headers
/// that a proxy adds.
fn check_direct(head: &Parts, has_proof: bool) -> Result<(), Refusal> {
    let is_of_proxy = |name: &HeaderName| ["x-forwarded-for", "forwarded", "via"].contains(&name.as_str());
    assert_eq!(is_forwarded(&head.headers), head.headers.keys().any(is_of_proxy));
    if !has_proof && is_forwarded(&head.headers) { Err(forwarded()) } else { Ok(()) }
}

fn imds_answer(head: &Parts, request: imds::Request<'_>) -> Result<Response, Refusal> {
    assert!(!head.headers.contains_key(ORIGIN) && !head.headers.contains_key("sec-fetch-site"));
    assert!(head.headers.get_all(HOST).iter().count() <= 1);
    match request {
        imds::Request::Token { ttl_secs } => {
            assert_eq!(head.method, Method::PUT);
            assert!((1..=21_600).contains(&ttl_secs));
            assert!(!is_forwarded(&head.headers));
            Ok(imds::token("token".to_owned(), ttl_secs))
        }
        imds::Request::Read { session, path } => {
            assert!(matches!(head.method, Method::GET | Method::HEAD));
            check_direct(head, session.is_some())?;
            match path {
                ReadPath::Fact(fact) => imds::fact(fact, &Instance::default()),
                ReadPath::Listing(names) => Ok(imds::listing(names)),
                ReadPath::Other => Err(imds::not_found()),
                path => imds::credentials(path, &credentials()),
            }
        }
    }
    .inspect(|response| assert_eq!(response.status(), StatusCode::OK))
}

/// A service-account token. One without three segments is refused, and no refusal quotes it at length.
pub fn jwt(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match claims::read(&text, Timestamp::UNIX_EPOCH) {
        Ok(_) => assert!(text.len() <= claims::MAX_LEN && text.matches('.').count() == 2),
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

/// An IMDS token. Without the key none can be made; one that was minted is valid until it expires and for its pod only, and
/// changing any byte makes it invalid.
#[expect(clippy::expect_used, reason = "test code")]
pub fn imds_token(bytes: &[u8]) {
    let tokens = ImdsTokens::new(&[7; 32]);
    assert!(!tokens.is_valid(&String::from_utf8_lossy(bytes), pod_uid(), Timestamp::UNIX_EPOCH));
    let Some(([seconds @ .., position, byte], _)) = bytes.split_first_chunk::<6>() else { return };
    let seconds = u32::from_le_bytes(*seconds);
    let (pod, ttl_secs) = (pod_uid(), 1 + seconds % 21_600);
    let at = |second: u32| Timestamp::from_second(second.into()).expect("a time before 2200");
    let token = tokens.mint(pod, at(seconds), ttl_secs);
    let end = seconds.saturating_add(ttl_secs);
    assert!(tokens.is_valid(&token, pod, at(end - 1)) || end == u32::MAX);
    assert!(end == u32::MAX || !tokens.is_valid(&token, pod, at(end)));
    assert!(!tokens.is_valid(&token, pod_uid(), at(seconds)));
    let mut changed = token.clone().into_bytes();
    let position = usize::from(*position) % changed.len();
    changed[position] = *byte;
    let changed = String::from_utf8_lossy(&changed);
    assert_eq!(tokens.is_valid(&changed, pod, at(seconds)), *changed == *token);
}

/// The ARN of an assumed role. It begins with what was parsed from it.
pub fn role(bytes: &[u8]) {
    let arn = String::from_utf8_lossy(bytes);
    if let Some(Role { account_id, partition, name }) = Role::from_assumed_role_arn(&arn) {
        assert!(arn.starts_with(&format!("arn:{partition}:sts::{account_id}:assumed-role/{name}/")));
        assert!(!name.contains('/') && !account_id.contains(':') && !partition.contains(':'));
    }
}

/// A pod as the API server sends it. Only the annotations that podgate needs are cached.
pub fn api_pod(bytes: &[u8]) {
    let Ok(sent) = serde_json::from_slice::<core::Pod>(bytes) else { return };
    let Some(pod) = Pod::from_api(&sent) else { return };
    assert_eq!(sent.metadata.namespace, Some(pod.service_account.namespace));
    assert!(pod.annotations.keys().all(|key| key.starts_with("podgate.dev/")));
}

/// The path of a cgroup below kubepods. Nothing below a pod's cgroup changes the pod.
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
        assert!(token.expose().len() <= claims::MAX_LEN && !token.expose().ends_with(char::is_whitespace));
        jwt(token.expose().as_bytes());
    }
}

/// Annotations: the operator's default and floor in the first byte, then lines with the values of the namespace's and the
/// pod's. No mode is below the floor, and a pod cannot loosen its own.
pub fn annotations(bytes: &[u8]) {
    let Some((first, values)) = bytes.split_first() else { return };
    let mode = |number: u8| MODES[usize::from(number & 3)];
    let defaults = Defaults {
        imds: mode(*first),
        imds_floor: mode(first >> 2),
        imds_unknown: UnknownPods::Strict,
        imds_v1: first & 16 != 0,
        tokenless: first & 32 != 0,
    };
    let text = String::from_utf8_lossy(values);
    let mut lines = text.split('\n');
    let mut next_annotations = || -> Annotations {
        ANNOTATIONS
            .iter()
            .zip(lines.by_ref())
            .filter(|(_, value)| *value != "-")
            .map(|(name, value)| ((*name).to_owned(), value.to_owned()))
            .collect()
    };
    let (namespace, of_pod) = (next_annotations(), next_annotations());
    for (annotations, scope) in [(&namespace, AnnotationScope::Namespace), (&of_pod, AnnotationScope::Pod)] {
        for unreadable in policy::unreadable(annotations, scope) {
            assert!(!unreadable.to_string().contains(char::is_control));
        }
    }
    let plain = pod("app", "web");
    let without = Policy::decide(&defaults, &namespace, &plain);
    let decided = Policy::decide(&defaults, &namespace, &Pod { annotations: of_pod, ..plain });
    assert!(decided.imds >= defaults.imds_floor);
    let may_loosen = namespace.get(ANNOTATION_IMDS_POD_OVERRIDE).is_some_and(|value| value == "true");
    assert!(may_loosen || decided.imds >= without.imds);
}

/// A record of the kernel: an event, or an origin as it is stored on a socket.
#[expect(unsafe_code, reason = "the record arrives as bytes")]
pub fn record(bytes: &[u8]) {
    if let Some((counter, event)) = intercept::decode(bytes) {
        let shown =
            format!("{} {:?} {}", counter.label(), event, serve::process_label(&event.comm, event.tgid));
        assert!(!shown.contains(char::is_control));
    }
    if bytes.len() == size_of::<Origin>() {
        // SAFETY: as long as an origin, which has no padding; every bit pattern is one.
        let origin = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<Origin>()) };
        let _ = (origin.orig_dst.service(), origin.orig_dst.ip(), origin.orig_dst.same(&origin.target));
        assert!(!serve::process_label(&origin.comm, origin.tgid).contains(char::is_control));
    }
}

/// Transferred credentials: what is decoded encodes to the same.
#[expect(clippy::expect_used, reason = "test code")]
pub fn transferred(bytes: &[u8]) {
    if let Some(entries) = wire::decode(bytes) {
        let given = wire::encode(&entries).expect("JSON");
        assert_eq!(wire::decode(&given), Some(entries));
    }
}

/// The type information of a map, preceded by its length, and a value.
pub fn map_value(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (types, value) = rest.split_at(length);
    for number in 0..8 {
        let _ = mapdump::print_value(types, number, value, io::sink());
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Text that looks like a head, where most bytes matter.
    fn head() -> impl Strategy<Value = String> {
        let line = "(GET|PUT|HEAD|POST) (http://169\\.254\\.170\\.23)?/(v1/credentials|latest/api/token|latest/meta-data/[a-z/-]{0,30})(\\?[a-z]{0,3})?";
        let header = "(Host|Authorization|X-aws-ec2-metadata-token(-ttl-seconds)?|Content-Length|Expect|Via): ?[ -~]{0,40}\r\n";
        (line, vec(header, 0..5))
            .prop_map(|(line, headers)| format!("{line} HTTP/1.1\r\n{}\r\n", headers.concat()))
    }

    /// A fuzz target's name, and its function.
    type Target = (&'static str, fn(&[u8]));

    const OUTSIDE: [Target; 12] = [
        ("annotations", annotations),
        ("api_pod", api_pod),
        ("cgroup_path", cgroup_path),
        ("transferred", transferred),
        ("http_head", http_head),
        ("imds_token", imds_token),
        ("jwt", jwt),
        ("key_set", key_set),
        ("kubelets_token", kubelets_token),
        ("map_value", map_value),
        ("record", record),
        ("role", role),
    ];

    /// What the fuzz targets start from, and what they have found.
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
        fn no_head_makes_a_dialect_panic(piece: u8, head in head()) {
            http_head(&[&[piece][..], head.as_bytes()].concat());
        }

        #[test]
        fn no_bytes_make_a_parser_panic(bytes in vec(any::<u8>(), 0..300)) {
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
        fn no_record_of_the_kernel_makes_its_reader_panic(bytes in vec(any::<u8>(), size_of::<Origin>())) {
            record(&bytes);
        }
    }
}

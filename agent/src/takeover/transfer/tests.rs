use std::os::unix::fs::PermissionsExt as _;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use proptest::{collection::vec, prelude::*};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::{wire::decode, *};
use crate::testing::{credentials, pod};

/// An active agent that waits for its successor, and what both know.
struct Scene {
    directory: TempDir,
    key: HandoverKey,
    active: watch::Sender<bool>,
    metrics: HandoverMetrics,
    serving: JoinHandle<()>,
}

impl Scene {
    async fn of(entries: Vec<Transferred>) -> Self {
        Self::with(entries, |pid| pid == std::process::id().cast_signed()).await
    }

    async fn with(
        entries: Vec<Transferred>,
        may_be_successor: impl Fn(i32) -> bool + Send + Sync + 'static,
    ) -> Self {
        let (directory, key) = (TempDir::new().unwrap(), HandoverKey::random().unwrap());
        let (active, is_active) = watch::channel(true);
        let metrics = HandoverMetrics::default();
        let predecessor = Predecessor {
            directory: directory.path().to_owned(),
            key: key.clone(),
            entries: move || entries.clone(),
            may_be_successor: move |pid| std::future::ready(may_be_successor(pid)),
            metrics: metrics.clone(),
        };
        let serving = tokio::spawn(predecessor.serve(is_active));
        let scene = Self { directory, key, active, metrics, serving };
        while !scene.socket().exists() {
            tokio::task::yield_now().await;
        }
        scene
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }

    async fn ask(&self, key: &HandoverKey) -> Result<Vec<Transferred>, Error> {
        ask(self.directory.path(), key, &HandoverMetrics::default()).await
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    fn counted(&self, outcome: &'static str) -> u64 {
        self.metrics.0.get_or_create(&Labels { side: "predecessor", outcome }).get()
    }
}

/// Makes another answer of an answer.
type Spoil = fn(Vec<u8>) -> Vec<u8>;

fn entry(name: &str) -> Transferred {
    let pod = pod("app", name);
    let credentials = Arc::new(credentials());
    Transferred {
        pod: pod.uid,
        service_account: pod.service_account,
        refresh_at: credentials.obtained_at,
        credentials,
        asked: true,
    }
}

fn hello(nonce: Nonce) -> Vec<u8> {
    [&HELLO[..], &nonce].concat()
}

/// What comes until the other side hangs up, or for as long as a handover may take.
async fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = timeout(2 * TIMEOUT, stream.read_to_end(&mut rest)).await.expect("it hangs up");
    rest
}

/// Something other than an agent that has replaced the socket, for one handover.
fn impostor<F: Future<Output = ()> + Send + 'static>(
    directory: &Path,
    talk: impl FnOnce(UnixStream) -> F + Send + 'static,
) {
    let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
    tokio::spawn(async move { talk(listener.accept().await.unwrap().0).await });
}

#[tokio::test]
async fn the_successor_gets_everything_as_often_as_it_asks() {
    let entries: Vec<_> = (0..500).map(|n| entry(&format!("web{n}"))).collect();
    let scene = Scene::of(entries.clone()).await;
    for _ in 0..2 {
        assert_eq!(scene.ask(&scene.key).await.unwrap(), entries);
    }
    assert_eq!(scene.counted("ok"), 2);
    let mode = fs::metadata(scene.directory.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn a_draining_agent_answers_until_its_successor_replaces_the_socket() {
    let scene = Scene::of(vec![entry("web")]).await;
    scene.active.send_replace(false);
    assert_eq!(scene.ask(&scene.key).await.unwrap().len(), 1);
    let listener = listen(scene.directory.path()).unwrap();
    let asked = tokio::spawn({
        let (directory, key) = (scene.directory.path().to_owned(), scene.key.clone());
        async move { ask(&directory, &key, &HandoverMetrics::default()).await }
    });
    listener.accept().await.unwrap();
    asked.await.unwrap().unwrap_err();
    // It becomes active again.
    scene.active.send_replace(true);
    while !matches!(scene.ask(&scene.key).await, Ok(entries) if entries.len() == 1) {
        tokio::task::yield_now().await;
    }
    assert!(!scene.serving.is_finished());
}

#[tokio::test]
async fn without_a_predecessor_nothing_is_waited_for() {
    let scene = Scene::of(vec![]).await;
    scene.serving.abort();
    assert!(scene.serving.await.unwrap_err().is_cancelled());
    let key = HandoverKey::random().unwrap();
    let asked = ask(scene.directory.path(), &key, &scene.metrics).await;
    assert!(matches!(asked, Err(Error::NoPredecessor)), "{asked:?}: its socket's file is still there");
    let asked = ask(Path::new("/nonexistent"), &key, &scene.metrics).await;
    assert!(matches!(asked, Err(Error::NoPredecessor)), "{asked:?}");
}

#[tokio::test]
async fn a_peer_with_another_key_gets_nothing_and_is_not_believed() {
    let scene = Scene::of(vec![entry("web")]).await;
    let other = HandoverKey::random().unwrap();
    let asked = scene.ask(&other).await;
    assert!(matches!(asked, Err(Error::NoProof)), "{asked:?}");
    assert_eq!((scene.counted("no_proof"), scene.counted("ok")), (1, 0));
}

#[tokio::test]
async fn a_peer_without_proof_gets_a_nonce_and_nothing_else() {
    let scene = Scene::of(vec![entry("web")]).await;
    let other_version = [&b"podgate/hand/v2\n"[..], &[0; NONCE]].concat();
    let cases: [(&str, Vec<Vec<u8>>, usize); 6] = [
        ("nothing", vec![], 0),
        ("half a greeting", vec![hello([1; NONCE])[..20].to_vec()], 0),
        ("another version", vec![other_version], 0),
        ("a greeting", vec![hello([1; NONCE])], NONCE),
        ("half a proof", vec![hello([1; NONCE]), vec![0; PROOF - 1]], NONCE),
        ("zeroes for a proof", vec![hello([1; NONCE]), vec![0; PROOF]], NONCE),
    ];
    for (name, says, hears) in cases {
        let mut stream = scene.connect().await;
        for part in says {
            stream.write_all(&part).await.unwrap();
        }
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await.len(), hears, "{name}");
    }
    assert_eq!(scene.counted("ok"), 0);
    assert_eq!(scene.ask(&scene.key).await.unwrap().len(), 1, "and the next agent is answered");
}

#[tokio::test]
async fn a_silent_peer_does_not_delay_the_successor() {
    let scene = Scene::of(vec![entry("web")]).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(scene.connect().await);
    }
    let begun = Instant::now();
    assert_eq!(scene.ask(&scene.key).await.unwrap().len(), 1);
    assert!(begun.elapsed() < TIMEOUT / 2, "{:?}", begun.elapsed());
    // Each has its time, and no more.
    for stream in &mut silent {
        assert!(rest(stream).await.is_empty());
    }
    assert!(begun.elapsed() < 2 * TIMEOUT, "{:?}", begun.elapsed());
    assert_eq!((scene.counted("slow"), scene.counted("ok")), (4, 1));
}

#[tokio::test]
async fn processes_of_other_pods_are_refused_however_often_they_come() {
    let is_foreign = Arc::new(AtomicBool::new(true));
    let is_foreign_now = Arc::clone(&is_foreign);
    let scene = Scene::with(vec![entry("web")], move |_| !is_foreign_now.load(Relaxed)).await;
    let mut silent = Vec::new();
    for _ in 0..10 * CONCURRENT_MAX {
        silent.push(scene.connect().await);
    }
    let begun = Instant::now();
    scene.ask(&scene.key).await.unwrap_err();
    for stream in &mut silent {
        assert!(rest(stream).await.is_empty());
    }
    is_foreign.store(false, Relaxed);
    assert_eq!(scene.ask(&scene.key).await.unwrap().len(), 1);
    assert!(begun.elapsed() < TIMEOUT / 2, "{:?}", begun.elapsed());
    assert_eq!(scene.counted("foreign"), 10 * CONCURRENT_MAX as u64 + 1);
}

#[test]
fn sockets_are_removed_and_their_directory_unless_it_is_shared() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("handover");
    assert!(left(&directory).unwrap().is_empty());
    fs::create_dir(&directory).unwrap();
    let [socket, next, other] = ["handover.sock", "handover.sock.12", "notes"].map(|name| {
        let path = directory.join(name);
        fs::write(&path, "").unwrap();
        path
    });
    let mut found = left(&directory).unwrap();
    found.sort();
    assert_eq!(found, [&*socket, &*next]);
    fs::remove_file(other).unwrap();
    let found = left(&directory).unwrap();
    assert_eq!((found.len(), found.last()), (3, Some(&directory)));
    for path in &found {
        files::remove_if_present(path).unwrap();
    }
    assert!(!directory.exists());
}

#[tokio::test]
async fn an_overheard_proof_cannot_be_replayed() {
    let scene = Scene::of(vec![entry("web")]).await;
    // A man in the middle hears a whole handover.
    let (nonce, proof) = {
        let mut stream = scene.connect().await;
        let own = [7; NONCE];
        stream.write_all(&hello(own)).await.unwrap();
        let mut predecessor = Nonce::default();
        stream.read_exact(&mut predecessor).await.unwrap();
        let proof = Session::new(&scene.key, own, predecessor).proof();
        stream.write_all(&proof).await.unwrap();
        assert!(rest(&mut stream).await.len() > 4, "that one is good");
        (own, proof)
    };
    let mut stream = scene.connect().await;
    stream.write_all(&[&hello(nonce)[..], &proof].concat()).await.unwrap();
    assert_eq!(rest(&mut stream).await.len(), NONCE, "replayed");
}

#[tokio::test]
async fn overheard_credentials_cannot_be_replayed() {
    let scene = Scene::of(vec![entry("web")]).await;
    let mut stream = scene.connect().await;
    let own = [7; NONCE];
    stream.write_all(&hello(own)).await.unwrap();
    let mut predecessor = Nonce::default();
    stream.read_exact(&mut predecessor).await.unwrap();
    stream.write_all(&Session::new(&scene.key, own, predecessor).proof()).await.unwrap();
    let overheard = rest(&mut stream).await;

    let elsewhere = TempDir::new().unwrap();
    impostor(elsewhere.path(), async move |mut stream: UnixStream| {
        let mut said = [0; HELLO.len() + NONCE];
        stream.read_exact(&mut said).await.unwrap();
        stream.write_all(&predecessor).await.unwrap();
        let mut proof = [0; PROOF];
        stream.read_exact(&mut proof).await.unwrap();
        stream.write_all(&overheard).await.unwrap();
    });
    let asked = ask(elsewhere.path(), &scene.key, &scene.metrics).await;
    assert!(matches!(asked, Err(Error::NoProof)), "{asked:?}");
}

#[tokio::test]
async fn an_agents_own_messages_are_no_proof_when_reflected() {
    let key = HandoverKey::random().unwrap();
    // The next agent meets itself: its own nonce, and then its own proof for an answer.
    let elsewhere = TempDir::new().unwrap();
    impostor(elsewhere.path(), async |mut stream: UnixStream| {
        let mut said = [0; HELLO.len() + NONCE];
        stream.read_exact(&mut said).await.unwrap();
        stream.write_all(&said[HELLO.len()..]).await.unwrap();
        let mut proof = [0; PROOF];
        stream.read_exact(&mut proof).await.unwrap();
        stream.write_all(&32_u32.to_be_bytes()).await.unwrap();
        stream.write_all(&proof).await.unwrap();
    });
    let asked = ask(elsewhere.path(), &key, &HandoverMetrics::default()).await;
    assert!(matches!(asked, Err(Error::NoProof)), "{asked:?}");
    // With the sides exchanged it is another handover.
    let (one, other) = ([1; NONCE], [2; NONCE]);
    assert!(Session::new(&key, one, other).accepts(&Session::new(&key, one, other).proof()));
    assert!(!Session::new(&key, one, other).accepts(&Session::new(&key, other, one).proof()));
}

#[tokio::test]
async fn an_answer_that_is_cut_changed_or_endless_is_refused_quickly() {
    let key = HandoverKey::random().unwrap();
    let of_agent = |own: Nonce, predecessor: Nonce| {
        let session = Session::new(&key, own, predecessor);
        session.seal(wire::encode(&[entry("web")]).unwrap()).unwrap()
    };
    let framed =
        |sealed: Vec<u8>| [&u32::try_from(sealed.len()).unwrap().to_be_bytes()[..], &sealed].concat();
    let cases: [(&str, Spoil); 5] = [
        ("cut", |mut bytes| bytes.split_off(bytes.len() - 9)),
        ("one bit", |mut bytes| {
            bytes[40] ^= 1;
            bytes
        }),
        ("the seal's bit", |mut bytes| {
            *bytes.last_mut().unwrap() ^= 1;
            bytes
        }),
        ("four gigabytes", |mut bytes| {
            bytes[..4].fill(0xff);
            bytes
        }),
        ("no length", |_| vec![0]),
    ];
    for (name, spoil) in cases {
        let elsewhere = TempDir::new().unwrap();
        // It has the key: everything but the spoiling is right.
        let listener = UnixListener::bind(elsewhere.path().join(SOCKET)).unwrap();
        let impostor = async {
            let mut stream = listener.accept().await.unwrap().0;
            let mut said = [0; HELLO.len() + NONCE];
            stream.read_exact(&mut said).await.unwrap();
            let own = Nonce::try_from(&said[HELLO.len()..]).unwrap();
            stream.write_all(&[9; NONCE]).await.unwrap();
            let mut proof = [0; PROOF];
            stream.read_exact(&mut proof).await.unwrap();
            stream.write_all(&spoil(framed(of_agent(own, [9; NONCE])))).await.unwrap();
            drop(stream);
        };
        let metrics = HandoverMetrics::default();
        let ((), asked) = tokio::join!(impostor, ask(elsewhere.path(), &key, &metrics));
        asked.expect_err(name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_handover_takes_no_longer_than_its_timeout() {
    let key = HandoverKey::random().unwrap();
    let elsewhere = TempDir::new().unwrap();
    impostor(elsewhere.path(), async |stream: UnixStream| {
        sleep(Duration::from_mins(1)).await;
        drop(stream);
    });
    let begun = tokio::time::Instant::now();
    let asked = ask(elsewhere.path(), &key, &HandoverMetrics::default()).await;
    assert!(matches!(asked, Err(Error::Slow)) && begun.elapsed() <= TIMEOUT, "{asked:?}");

    let scene = Scene::of(vec![entry("web")]).await;
    let mut silent = scene.connect().await;
    silent.write_all(&HELLO[..5]).await.unwrap();
    let begun = tokio::time::Instant::now();
    assert!(rest(&mut silent).await.is_empty() && begun.elapsed() <= TIMEOUT);
    assert_eq!(scene.counted("slow"), 1);
}

#[test]
fn errors_and_entries_print_no_secret() {
    let printed = format!(
        "{:?} {:?}",
        entry("web"),
        [Error::NoProof, Error::Malformed, Error::Slow, Error::NoPredecessor]
    );
    for secret in ["\"secret\"", "\"session\""] {
        assert!(!printed.contains(secret), "{printed}");
    }
    assert!(printed.contains("redacted"));
}

proptest! {
    #[test]
    fn entries_survive_encoding(names in vec(("[ -~\u{e9}]{0,20}", "[A-Za-z0-9+/=\"\\\\]{0,80}", any::<bool>()), 0..8)) {
        let entries: Vec<_> = names.into_iter().map(|(name, secret, asked)| {
            let mut credentials = credentials();
            credentials.session_token = secret.as_str().into();
            credentials.secret_access_key = secret.into();
            Transferred { asked, credentials: Arc::new(credentials), ..entry(&name) }
        }).collect();
        prop_assert_eq!(decode(&wire::encode(&entries).unwrap()), Some(entries));
    }

    #[test]
    fn random_bytes_are_refused(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(decode(&bytes).is_none_or(|entries| entries.is_empty()));
    }

    #[test]
    fn truncated_entries_are_refused(cut in 1_usize..400) {
        let whole = wire::encode(&[entry("web")]).unwrap();
        let length = whole.len().saturating_sub(cut);
        prop_assert!(decode(&whole[..length]).is_none());
    }

    #[test]
    fn a_sealed_answer_with_any_bit_flipped_is_refused(place: prop::sample::Index, bit in 0..8) {
        let session = Session::new(&HandoverKey::random().unwrap(), [1; NONCE], [2; NONCE]);
        let mut sealed = session.seal(wire::encode(&[entry("web")]).unwrap()).unwrap();
        let place = place.index(sealed.len());
        sealed[place] ^= 1_u8 << bit;
        prop_assert!(session.open(sealed).is_err());
    }
}

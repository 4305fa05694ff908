//! Where releases come from: an https address, http on loopback, or a directory for hosts that
//! reach nothing. Every read has a cap and a time-out; a redirect leads to https or nowhere.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{error, fmt};

use tonic::transport::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Proxy};

use crate::digest::Digester;

const REDIRECTS: u32 = 5;
const CONNECT: Duration = Duration::from_secs(15);
const ANSWER: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(30);
const WHOLE: Duration = Duration::from_secs(15 * 60);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mirror {
    /// The address without a slash at its end.
    Web(String, Reach),
    Directory(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// By https, through a proxy where the environment names one.
    World,
    /// By http, directly.
    Loopback,
}

#[derive(Debug, thiserror::Error)]
#[error(
    "use the mirror {0:?}: it must be an https address without a password, http on loopback, or \
     a directory"
)]
pub(crate) struct Malformed(String);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Another host may do better.
    #[error("reach {at}")]
    Unreachable {
        at: String,
        #[source]
        source: Box<dyn error::Error + Send + Sync>,
    },
    #[error("find {at}: the mirror does not have it")]
    Absent { at: String },
    #[error("take {at}: it is larger than {limit} bytes")]
    TooLarge { at: String, limit: u64 },
    #[error("keep what {at} holds")]
    Keep {
        at: String,
        #[source]
        source: io::Error,
    },
}

impl Mirror {
    pub(crate) fn parse(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed(text.to_owned());
        if !text.contains("://") {
            if text.is_empty() {
                return Err(malformed());
            }
            return std::path::absolute(text).map(Self::Directory).map_err(|_| malformed());
        }
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        let authority = uri.authority().ok_or_else(malformed)?;
        // It would be shown with every failure.
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(malformed());
        }
        let reach = match uri.scheme_str() {
            Some("https") => Reach::World,
            Some("http") if is_loopback(authority.host()) => Reach::Loopback,
            Some(_) | None => return Err(malformed()),
        };
        Ok(Self::Web(text.trim_end_matches('/').to_owned(), reach))
    }

    /// Reads a small file.
    pub(crate) fn read(&self, file: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.copy(file, limit, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies a file, and answers its SHA-256.
    pub(crate) fn copy(&self, file: &str, limit: u64, to: &mut dyn Write) -> Result<String, Error> {
        let (at, mut from) = match self {
            Self::Web(base, reach) => {
                let at = format!("{base}/{file}");
                let from = get(&at, *reach)?;
                (at, from)
            }
            Self::Directory(directory) => {
                let path = directory.join(file);
                let at = path.display().to_string();
                let from = open(directory, &path, &at)?;
                (at, from)
            }
        };
        let mut digester = Digester::new();
        let mut buffer = vec![0u8; 256 * 1024];
        let mut length = 0;
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => return Ok(digester.finish()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Unreachable { at, source: error.into() }),
            };
            length += read as u64;
            if length > limit {
                return Err(Error::TooLarge { at, limit });
            }
            digester.update(&buffer[..read]);
            to.write_all(&buffer[..read])
                .map_err(|source| Error::Keep { at: at.clone(), source })?;
        }
    }
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Web(base, _) => f.write_str(base),
            Self::Directory(directory) => write!(f, "{}", directory.display()),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn open(directory: &Path, path: &Path, at: &str) -> Result<Box<dyn Read>, Error> {
    match File::open(path) {
        Ok(file) => Ok(Box::new(file)),
        // A mirror that is not mounted has everything some other time.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && fs::metadata(directory).is_ok() =>
        {
            Err(Error::Absent { at: at.to_owned() })
        }
        Err(error) => Err(Error::Unreachable { at: at.to_owned(), source: error.into() }),
    }
}

fn get(at: &str, reach: Reach) -> Result<Box<dyn Read>, Error> {
    let answer = match agent(reach) {
        Ok(agent) => agent.get(at).call(),
        Err(source) => return Err(Error::Unreachable { at: at.to_owned(), source: source.into() }),
    };
    match answer {
        Ok(answer) if answer.status() == 200 => Ok(Box::new(answer.into_body().into_reader())),
        // From loopback, redirects are not followed.
        Ok(answer) => {
            let source = format!("it answers with {}", answer.status()).into();
            Err(Error::Unreachable { at: at.to_owned(), source })
        }
        // Some file servers do not tell what is absent from what is not for us.
        Err(ureq::Error::StatusCode(403 | 404 | 410)) => Err(Error::Absent { at: at.to_owned() }),
        Err(error) => Err(Error::Unreachable { at: at.to_owned(), source: error.into() }),
    }
}

fn agent(reach: Reach) -> Result<Agent, io::Error> {
    let config = Agent::config_builder()
        .user_agent(concat!("latchkey-runner/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(ANSWER))
        .timeout_per_read(Some(SILENCE))
        .timeout_global(Some(WHOLE))
        .max_redirects_will_error(true);
    let config = match reach {
        Reach::World => {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let tls = TlsConfig::builder()
                .unversioned_rustls_crypto_provider(provider)
                .root_certs(roots()?)
                .build();
            let config = config.https_only(true).max_redirects(REDIRECTS).tls_config(tls);
            config.proxy(Proxy::try_from_env())
        }
        Reach::Loopback => config.max_redirects(0).proxy(None),
    };
    Ok(config.build().new_agent())
}

/// Answers what this host trusts, so that a company's own mirror needs no setting of ours.
fn roots() -> Result<RootCerts, io::Error> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "this host has no certificates of authorities (package ca-certificates)",
        ));
    }
    let all = found.certs.iter().map(|der| Certificate::from_der(der).to_owned());
    Ok(RootCerts::from(all))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::{Mutex, mpsc};
    use std::thread;

    use super::super::release::Release;
    use super::*;
    use crate::digest;

    /// A mirror on loopback, over http, that counts what is asked for.
    #[derive(Clone)]
    pub(crate) struct Server {
        pub(crate) base: String,
        files: Arc<Mutex<BTreeMap<String, Answer>>>,
        asked: Arc<Mutex<Vec<String>>>,
    }

    #[derive(Clone)]
    pub(crate) enum Answer {
        Body(Arc<Vec<u8>>),
        /// Fewer bytes than it promised.
        Cut(Arc<Vec<u8>>),
        Status(u16),
        Redirect(String),
        /// Half of it, then a word to the test, then silence.
        Stalled(Arc<Vec<u8>>, mpsc::Sender<()>),
    }

    impl Server {
        pub(crate) fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let base = format!("http://{}", listener.local_addr().unwrap());
            let server = Self { base, files: Arc::default(), asked: Arc::default() };
            let answering = server.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let answering = answering.clone();
                    thread::spawn(move || {
                        let mut stream = stream.unwrap();
                        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                        let first = lines.next().unwrap().unwrap();
                        let path = first.split(' ').nth(1).unwrap().trim_start_matches('/');
                        while lines.next().unwrap().is_ok_and(|line| !line.is_empty()) {}
                        let _ = stream.write_all(&answering.answer(path));
                        let answer = answering.files.lock().unwrap().get(path).cloned();
                        if let Some(Answer::Stalled(_, told)) = answer {
                            told.send(()).unwrap();
                            // Until the other side goes away.
                            let _ = stream.read(&mut [0; 1]);
                        }
                    });
                }
            });
            server
        }

        fn answer(&self, path: &str) -> Vec<u8> {
            self.asked.lock().unwrap().push(path.to_owned());
            let found = self.files.lock().unwrap().get(path).cloned();
            let head = |status: u16, length: usize, more: &str| {
                format!(
                    "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close\r\n\
                     {more}\r\n"
                )
                .into_bytes()
            };
            match found.unwrap_or(Answer::Status(404)) {
                Answer::Body(body) => [head(200, body.len(), ""), body.to_vec()].concat(),
                Answer::Cut(body) | Answer::Stalled(body, _) => {
                    [head(200, body.len(), ""), body[..body.len() / 2].to_vec()].concat()
                }
                Answer::Status(status) => head(status, 0, ""),
                Answer::Redirect(to) => head(302, 0, &format!("location: {to}\r\n")),
            }
        }

        pub(crate) fn put(&self, path: &str, answer: Answer) {
            self.files.lock().unwrap().insert(path.to_owned(), answer);
        }

        pub(crate) fn put_body(&self, path: &str, body: impl Into<Vec<u8>>) {
            self.put(path, Answer::Body(Arc::new(body.into())));
        }

        /// Puts an archive where a release's is, and lists its checksum.
        pub(crate) fn put_release(&self, release: &str, archive: Vec<u8>) {
            let release: Release = release.parse().unwrap();
            let sums = format!("{}  {}\n", digest::of_bytes(&archive), release.archive());
            self.put_body(&release.in_mirror(&release.sums()), sums);
            self.put_body(&release.in_mirror(&release.archive()), archive);
        }

        pub(crate) fn downloads(&self, release: &str) -> usize {
            let release: Release = release.parse().unwrap();
            self.asked(&release.in_mirror(&release.archive()))
        }

        /// How often a file was asked for.
        pub(crate) fn asked(&self, path: &str) -> usize {
            self.asked.lock().unwrap().iter().filter(|asked| *asked == path).count()
        }

        pub(crate) fn mirror(&self) -> Mirror {
            Mirror::parse(&self.base).unwrap()
        }
    }

    #[test]
    fn a_mirror_is_https_or_loopback_or_a_directory() {
        for good in
            ["https://m.example/x/", "http://127.0.0.1:80/x", "http://[::1]:8", "http://localhost"]
        {
            assert!(matches!(Mirror::parse(good), Ok(Mirror::Web(..))), "{good}");
        }
        assert_eq!(Mirror::parse("/srv/x").unwrap(), Mirror::Directory("/srv/x".into()));
        for bad in [
            "http://m.example",
            "http://127.0.0.1.example",
            "ftp://127.0.0.1",
            "https://user:password@m.example",
            "https://m.example/?token=x",
            "https://",
            "",
        ] {
            assert!(Mirror::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn absent_and_unreachable_are_told_apart() {
        let server = Server::start();
        server.put_body("whole", "text");
        for (path, status) in [("broken", 500), ("busy", 429), ("denied", 403)] {
            server.put(path, Answer::Status(status));
        }
        server.put("cut", Answer::Cut(Arc::new(vec![7; 100_000])));
        // Plain http elsewhere, even on loopback, is not where a redirect may lead.
        server.put("moved", Answer::Redirect(format!("{}/whole", server.base)));
        let mirror = server.mirror();
        assert_eq!(mirror.read("whole", 100).unwrap(), b"text");
        for path in ["absent", "denied"] {
            let error = mirror.read(path, 100).unwrap_err();
            assert!(matches!(error, Error::Absent { .. }), "{path}: {error:?}");
        }
        for path in ["broken", "busy", "moved"] {
            let error = mirror.read(path, 100).unwrap_err();
            assert!(matches!(error, Error::Unreachable { .. }), "{path}: {error:?}");
        }
        let error = mirror.read("cut", 1 << 20).unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
        assert!(matches!(mirror.read("whole", 3), Err(Error::TooLarge { .. })));
        let nobody = Mirror::parse("http://127.0.0.1:1").unwrap();
        assert!(matches!(nobody.read("x", 1), Err(Error::Unreachable { .. })));
    }

    #[test]
    fn a_directory_that_is_not_there_is_unreachable() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = Mirror::Directory(dir.path().to_owned());
        assert!(matches!(mirror.read("1.0.0/x", 1), Err(Error::Absent { .. })));
        let gone = Mirror::Directory(dir.path().join("not-mounted"));
        assert!(matches!(gone.read("1.0.0/x", 1), Err(Error::Unreachable { .. })));
    }
}

//! One error type. Its [`ErrorKind`] says what the caller should do, not what broke inside.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What went wrong, cheap to clone: one failed load is handed to every caller that waited for it.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Arc<str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// What the caller of a failed operation should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option, key or value makes no sense. Change the call: trying again fails again.
    Config,
    /// The shared store or the bus could not be reached. What was asked may have happened in part and is repaired in
    /// the background; try again if it must be certain now.
    Unavailable,
    /// The shared store or the bus answered, but refused: it is out of memory, read-only, or does not permit it. See the
    /// message; trying again helps once that is changed. What was asked is repaired in the background.
    Refused,
    /// A deadline passed. What was asked may still happen; try again or do without.
    Timeout,
    /// The loader failed. Its own error is the source: [`Error::loader_error`] gives it back.
    Loader,
    /// A value could not be encoded or decoded. Change the value, its type or the codec.
    Codec,
    /// The cache was closed. Build a new one.
    Closed,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Arc<str>>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn config(message: impl Into<Arc<str>>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the cache is closed")
    }

    /// The server behind a store or bus could not be reached, or did not answer as it should.
    pub fn unavailable(message: impl Into<Arc<str>>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// A deadline of the store or bus passed.
    pub fn timeout(message: impl Into<Arc<str>>) -> Self {
        Self::new(ErrorKind::Timeout, message)
    }

    /// A value could not be encoded or decoded.
    pub fn codec(message: impl Into<Arc<str>>) -> Self {
        Self::new(ErrorKind::Codec, message)
    }

    /// A loader's own failure, kept as it is.
    pub fn loader(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let source: Arc<dyn StdError + Send + Sync> = Arc::from(error.into());
        Self { kind: ErrorKind::Loader, message: format!("the loader failed: {source}").into(), source: Some(source) }
    }

    /// Adds what caused this error.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The loader's own error, if this is a failed load of that type.
    pub fn loader_error<E: StdError + 'static>(&self) -> Option<&E> {
        match self.kind {
            ErrorKind::Loader => self.source.as_deref().and_then(|source| source.downcast_ref()),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// The result of a cache operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

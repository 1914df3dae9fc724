package fsbroker

// sieve is an eviction order (SIEVE, Zhang et al., NSDI '24): a list whose links are in the forms. The zero value is empty.
type sieve struct {
	newest, oldest *form
	hand           *form // the next candidate; nil means the oldest
	length         int
}

// add adds f as the newest.
func (s *sieve) add(f *form) {
	f.older = s.newest
	s.newest = f
	if f.older == nil {
		s.oldest = f
	} else {
		f.older.newer = f
	}
	s.length++
}

func (s *sieve) remove(f *form) {
	if s.hand == f {
		s.hand = f.newer
	}
	if f.newer == nil {
		s.newest = f.older
	} else {
		f.newer.older = f.older
	}
	if f.older == nil {
		s.oldest = f.newer
	} else {
		f.older.newer = f.newer
	}
	f.newer, f.older = nil, nil
	s.length--
}

// next returns the form to evict, or nil if there is none. The hand moves from the oldest to the newest form. It spares
// those that were visited since it last passed, and those that callers hold, because to evict them frees nothing.
func (s *sieve) next() *form {
	for range 2 * s.length { // the first round takes the marks
		if s.hand == nil {
			s.hand = s.oldest
		}
		f := s.hand
		if !f.visited.Swap(false) && f.holders.Load() == 0 {
			return f
		}
		s.hand = f.newer
	}
	return nil
}

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// compressor is one way to compress a report.
type compressor struct {
	name string
	writer
}

type writer interface {
	io.WriteCloser
	Reset(io.Writer)
}

func compressors() ([]compressor, error) {
	var all []compressor
	for _, level := range []int{1, 6, 9} {
		zw, err := gzip.NewWriterLevel(nil, level)
		if err != nil {
			return nil, err
		}
		all = append(all, compressor{fmt.Sprintf("gzip, level %d", level), zw})
	}
	for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
		zw, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		all = append(all, compressor{fmt.Sprintf("zstd, %s", level), zw})
	}
	return all, nil
}

// compression compresses the reports in all ways that the module could use. It uses gzip at level 6.
func (h *harness) compression(_ context.Context, _ []*contender, results *results) error {
	progress.Print("compressing reports")
	ways, err := compressors()
	if err != nil {
		return err
	}
	for _, size := range h.sizes {
		for _, way := range ways {
			var compressed bytes.Buffer
			var took []time.Duration
			for range max(5, h.options.rounds) {
				compressed.Reset()
				begin := time.Now()
				way.Reset(&compressed)
				if _, err := way.Write(size.document); err != nil {
					return err
				}
				if err := way.Close(); err != nil {
					return err
				}
				took = append(took, time.Since(begin))
			}
			results.compression = append(results.compression, compressionResult{
				size, way.name, compressed.Len(), median(took, func(d time.Duration) time.Duration { return d }),
			})
		}
	}
	return nil
}

-- Tell those who watch how far a running job is, fenced. ARGV: now, worker, id, attempt, data. Returns 1 when told.

if not owns(ARGV[3], ARGV[2], ARGV[4]) then
  return 0
end
note(ARGV[3], 'progress', now_ms(ARGV[1]), 'data', ARGV[5])
return 1
